"""Speculation loses nothing: greedy text is identical, sampled text follows the trunk's law, caches stay true."""

import itertools
import math

import pytest
import torch
from toy import ByteTokenizer

import baleen.infer.decoder
from baleen.infer.decoder import Decoder
from baleen.infer.engine import Engine, Request
from baleen.infer.sampler import SamplingParams, draw
from baleen.infer.speculative import verify
from baleen.model.cache import LatentCache

DRAWS = 100_000


def chi_square_excess(counts, probs):
    """Standard deviations by which chi-square lies above its mean (Wilson-Hilferty); below 4 for a true sampler.

    Cells that expect fewer than ten draws are counted as one; a draw of probability 0 is infinitely wrong.
    """
    if counts[probs == 0].any():
        return math.inf
    draws = counts.sum()
    expected, rare = probs * draws, probs * draws < 10
    counts = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None])) + 1e-300
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    variance = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - variance)) / math.sqrt(variance)


# --- samplers that are wrong in ways seen in the wild


def residual_not_subtracted(target, draft, drafts, accept, final):
    kept, _ = verify(target, draft, drafts, accept, final)
    return kept, draw(target[torch.arange(len(kept)), kept], final)


def residual_without_clamp(target, draft, drafts, accept, final):
    kept, _ = verify(target, draft, drafts, accept, final)
    rows = torch.arange(len(kept))
    difference = (target[:, :-1] - draft)[rows, kept.clamp(max=drafts.shape[1] - 1)].abs()
    return kept, draw(torch.where((kept < drafts.shape[1])[:, None], difference, target[rows, kept]), final)


def accepts_too_often(target, draft, drafts, accept, final):
    return verify(target, draft, drafts, accept * 0.9, final)


def accepts_by_target_alone(target, draft, drafts, accept, final):
    return verify(target, torch.ones_like(draft), drafts, accept, final)


def judges_all_drafts_by_the_first(target, draft, drafts, accept, final):
    return verify(target, draft, drafts, accept[:, :1].expand_as(accept), final)


BROKEN = [
    residual_not_subtracted,
    residual_without_clamp,
    accepts_too_often,
    accepts_by_target_alone,
    judges_all_drafts_by_the_first,
]


def joint_of_three(verify):
    """Counts of 100,000 triples over 4 tokens: two drafts from q, verified against p, completed from p; and p's own."""
    generator = torch.Generator().manual_seed(0)
    Z = 4
    p1, q1 = (torch.randn(Z, generator=generator).double().softmax(-1) for _ in range(2))
    p2, q2 = (torch.randn(Z, Z, generator=generator).double().softmax(-1) for _ in range(2))
    p3 = torch.randn(Z, Z, Z, generator=generator).double().softmax(-1)
    u = torch.rand(DRAWS, 7, generator=generator, dtype=torch.float64)
    d1 = draw(q1.expand(DRAWS, Z), u[:, 0])
    d2 = draw(q2[d1], u[:, 1])
    target = torch.stack((p1.expand(DRAWS, Z), p2[d1], p3[d1, d2]), 1)
    draft = torch.stack((q1.expand(DRAWS, Z), q2[d1]), 1)
    kept, new = verify(target, draft, torch.stack((d1, d2), 1), u[:, 2:4], u[:, 4])
    t1 = torch.where(kept >= 1, d1, new)
    t2 = torch.where(kept >= 2, d2, torch.where(kept == 1, new, draw(p2[t1], u[:, 5])))
    t3 = torch.where(kept == 2, new, draw(p3[t1, t2], u[:, 6]))
    counts = torch.bincount(t1 * Z * Z + t2 * Z + t3, minlength=Z**3)
    return counts, (p1[:, None, None] * p2[:, :, None] * p3).flatten(), kept


def test_verify_follows_the_target():
    counts, probs, kept = joint_of_three(verify)
    assert chi_square_excess(counts, probs) < 4
    assert torch.bincount(kept).min() > DRAWS / 20  # all of 0, 1 and 2 kept drafts are under test


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_verify_is_caught(broken):
    counts, probs, _ = joint_of_three(broken)
    assert chi_square_excess(counts, probs) > 8


def test_verify_where_target_and_draft_agree():
    """All drafts are kept, the largest random number below 1 included."""
    p = torch.tensor([[[0.3, 0.7], [0.5, 0.5]]], dtype=torch.float64)
    almost_one = torch.tensor([[1 - 2**-53]], dtype=torch.float64)
    for token in (0, 1):
        kept, _ = verify(p, p[:, :1], torch.tensor([[token]]), almost_one, torch.zeros(1))
        assert kept.tolist() == [1]


# --- the whole engine


def small(tiny_model, **changes):
    shape = {"vocab_size": 6, "num_hidden_layers": 2, "num_nextn_predict_layers": 2, "initializer_range": 0.4}
    return tiny_model(dtype=torch.float64, **{**shape, **changes})


@pytest.fixture
def smallest(tiny_model):
    """One dense layer and two MTP layers of width 8 over 6 tokens."""
    ranks = {"q_lora_rank": None, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    widths = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "initializer_range": 0.3}
    return small(tiny_model, num_hidden_layers=1, first_k_dense_replace=3, **ranks, **widths)


def triples(model, answers, depth=2, batch=2_000):
    """Counts of the first three tokens of sampled answers to one prompt, with temperature and top-k at work."""
    counts = torch.zeros(6**3, dtype=torch.long)
    kept = []
    for start in range(0, answers, batch):
        params = [SamplingParams(temperature=0.8, top_k=5, seed=start + i) for i in range(batch)]
        decoder = Decoder(model, [[3, 1, 4]] * batch, params, depth=depth)
        decoder.prefill()
        known = torch.ones(batch, dtype=torch.long)
        while known.min() < 3:
            new = decoder.step()
            kept += [len(tokens) - 1 for tokens in new]
            known += torch.tensor([len(tokens) for tokens in new])
        counts += torch.bincount(decoder.tokens_BS[:, 3:6] @ torch.tensor([36, 6, 1]), minlength=216)
    return counts, torch.bincount(torch.tensor(kept), minlength=depth + 1)


@torch.no_grad()
def exact_triples(model):
    """The trunk's distribution of those triples, from full forwards over every prefix."""
    pairs = torch.tensor([[3, 1, 4, a, b] for a, b in itertools.product(range(6), repeat=2)])
    logits = model.logits(model(pairs).hidden_BTd)[:, 2:] / 0.8
    fifth = logits.topk(5).values[..., -1:]
    probs = logits.masked_fill(logits < fifth, -torch.inf).softmax(-1)
    p1, p2, p3 = probs[:, 0].gather(1, pairs[:, 3:4]), probs[:, 1].gather(1, pairs[:, 4:5]), probs[:, 2]
    return (p1 * p2 * p3).flatten()


def test_engine_follows_the_trunk(smallest):
    counts, kept = triples(smallest, answers=34_000)  # of three draws each
    assert chi_square_excess(counts, exact_triples(smallest)) < 4
    assert kept.min() > kept.sum() / 20


def test_broken_engine_is_caught(smallest, monkeypatch):
    monkeypatch.setattr(baleen.infer.decoder, "verify", residual_not_subtracted)
    counts, _ = triples(smallest, answers=10_000)
    assert chi_square_excess(counts, exact_triples(smallest)) > 8


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_greedy_is_plain_greedy(tiny_model, depth):
    model = small(tiny_model, num_nextn_predict_layers=3)
    engine = Engine(model, ByteTokenizer())
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    generator = torch.Generator().manual_seed(depth)
    requests = [Request(torch.randint(0, 6, (n,), generator=generator).tolist(), params) for n in (1, 2, 3, 7, 20)]
    plain = engine.generate(requests)
    drafted = engine.generate(requests, speculate=depth)
    assert tokens_of(plain) == tokens_of(drafted)
    assert sum(drafted.stats.accepted) > 0 and drafted.stats.steps < plain.stats.steps


def test_in_float32_only_ties_may_differ(tiny_model):
    """DESIGN's rule of twins: another token only where the two best logits, or a routing margin, lie within 1e-4."""
    model = tiny_model(num_nextn_predict_layers=2)
    engine = Engine(model, ByteTokenizer())
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    generator = torch.Generator().manual_seed(0)
    requests = [Request(torch.randint(0, 97, (n,), generator=generator).tolist(), params) for n in range(1, 33)]
    plain = tokens_of(engine.generate(requests))
    together = tokens_of(engine.generate(requests, speculate=2))
    differing = [row for row in range(32) if plain[row] != together[row]]
    for row in differing:
        at = next(i for i in range(60) if plain[row][i] != together[row][i])
        assert margin(model, [*requests[row].prompt_ids, *plain[row][:at]]) < 1e-4
    assert len(differing) < 0.001 * 32 * 60


@torch.no_grad()
def margin(model, ids):
    """The least of the last logits' margin and, at every token, the margin of the chosen experts over the next."""
    hidden, routings = model(torch.tensor([ids]))
    best = model.logits(hidden[0, -1]).topk(2).values
    margins = [float(best[0] - best[1])]
    for gate, routing in zip(model.gates, routings, strict=False):
        choice = routing.scores_NE + gate.e_score_correction_bias
        groups = choice.unflatten(-1, (gate.config.n_group, -1)).topk(2).values.sum(-1).sort(descending=True).values
        margins.append(float((groups[:, gate.config.topk_group - 1] - groups[:, gate.config.topk_group]).min()))
        chosen = choice.gather(1, routing.indices_NK).amin(1, keepdim=True)
        margins.append(float((chosen - choice.where(choice < chosen, -torch.inf)).min()))
    return min(margins)


def tokens_of(generation):
    """Token ids per request."""
    out = {}
    for event in generation:
        out.setdefault(event.request, []).extend(event.token_ids)
    return out


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_caches_hold_only_accepted_tokens(tiny_model, depth, temperature):
    """After any mixture of acceptances, rows that leave included, the caches are those of a forward over the text."""
    model = small(tiny_model, num_nextn_predict_layers=3)
    prompts = [[1], [2, 3], [0, 5, 1, 4, 4, 2, 3], [1, 2]]
    params = [SamplingParams(temperature=temperature, seed=i) for i in range(4)]
    decoder = Decoder(model, prompts, params, depth=depth)
    decoder.prefill()
    kept = set()
    for step in range(12):
        if step == 6:
            decoder.select([3, 0, 2])
        drafted_at = decoder.lengths_B.tolist()
        kept |= {len(tokens) - 1 for tokens in decoder.step()}
        for row, length in enumerate(decoder.lengths_B.tolist()):
            assert_true_cache(model, decoder, row, length, drafted_at[row], depth)
    assert kept >= {0, 1}


@torch.no_grad()
def assert_true_cache(model, decoder, row, length, drafted_at, depth):
    """Trunk rows of all tokens but the last; MTP layer k's of those for which t_{i+k} was known when it drafted."""
    ids = decoder.tokens_BS[row : row + 1, :length].clone()
    fresh = LatentCache(model.config, 1, length, mtp=True, dtype=torch.float64)
    hidden = model(ids, cache=fresh).hidden_BTd
    for k in range(1, min(depth, length - 1) + 1):
        hidden = model.predict_ahead(k - 1, hidden[:, : length - k], ids[:, k:], cache=fresh).hidden_BTd
    layers = model.config.num_hidden_layers
    for layer in range(layers + depth):
        true = length - 1 if layer < layers else max(0, drafted_at - (layer - layers + 1))
        kept = decoder.cache.latents[layer, row, :true]
        torch.testing.assert_close(kept, fresh.latents[layer, 0, :true], rtol=1e-9, atol=1e-11)


# --- alignment and counts, on models whose acceptance is known


def counting_model(tiny_model, wrong_after=()):
    """Says t + 1 mod 12 by its embedding alone. Its MTP layers do too, but for tokens in `wrong_after`, where they
    say t."""
    Z = 12
    model = tiny_model(
        dtype=torch.float64, vocab_size=Z, hidden_size=2 * Z, num_hidden_layers=1, num_nextn_predict_layers=2
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
        model.model.embed_tokens.weight[:, :Z] = torch.eye(Z)
        model.lm_head.weight[:, :Z] = torch.eye(Z).roll(1, 0)
        for layer in model.mtp_layers:
            for token in range(Z):
                said = (token - 1) % Z if token in wrong_after else token
                layer.eh_proj.weight[said, token] = 1.0  # reads the embedding, the first half of its input
    return model


def test_acceptance_one(tiny_model):
    engine = Engine(counting_model(tiny_model), ByteTokenizer())
    params = SamplingParams(temperature=0, max_tokens=31)
    generation = engine.generate([Request([5], params)], speculate=2)
    assert tokens_of(generation)[0] == [(6 + i) % 12 for i in range(31)]
    stats = generation.stats
    assert (stats.steps, stats.drafted, stats.accepted) == (10, [10, 10], [10, 10])
    assert stats.acceptance == [1.0, 1.0] and stats.tokens_per_step == 3.0


def test_events_say_which_tokens_were_drafts(tiny_model):
    engine = Engine(counting_model(tiny_model), ByteTokenizer())
    events = list(engine.generate([Request([5], SamplingParams(temperature=0, max_tokens=6))], speculate=2))
    assert [(len(event.token_ids), event.accepted) for event in events] == [(1, 0), (3, 2), (2, 2)]


def test_acceptance_none(tiny_model):
    engine = Engine(counting_model(tiny_model, wrong_after=range(12)), ByteTokenizer())
    generation = engine.generate([Request([5], SamplingParams(temperature=0, max_tokens=31))], speculate=1)
    assert tokens_of(generation)[0] == [(6 + i) % 12 for i in range(31)]
    assert (generation.stats.steps, generation.stats.accepted) == (30, [0])
    assert generation.stats.tokens_per_step == 1.0


def test_acceptance_known(tiny_model):
    """Wrong after 0, 4 and 8: a step from there advances by one token, from elsewhere by two."""
    engine = Engine(counting_model(tiny_model, wrong_after=(0, 4, 8)), ByteTokenizer())
    generation = engine.generate([Request([1], SamplingParams(temperature=0, max_tokens=22))], speculate=1)
    tokens = tokens_of(generation)[0]
    assert tokens == [(2 + i) % 12 for i in range(22)]
    last, known, steps, accepted = 2, 1, 0, 0  # that rule, played through
    while known < 22:
        kept = last not in (0, 4, 8)
        last, known, steps, accepted = (last + 1 + kept) % 12, known + 1 + kept, steps + 1, accepted + kept
    assert (generation.stats.steps, generation.stats.accepted) == (steps, [accepted])
    assert generation.stats.tokens_per_step == 1 + accepted / steps
