"""Speculation loses nothing: every answer is the one that would have come without it, and caches stay true."""

import itertools

import pytest
import torch
from chi_square import chi_square_excess
from toy import ByteTokenizer, latents_of

import baleen.infer.step
from baleen.config import UserError
from baleen.infer.engine import Engine, Request
from baleen.infer.pages import DRAFTED, page_key
from baleen.infer.run import Run
from baleen.infer.runner import TorchRunner
from baleen.infer.sampler import Place, SamplingParams, choose
from baleen.infer.speculative import Payoff
from baleen.model.cache import Batch, LatentPages


def small(tiny_model, **changes):
    shape = {"vocab_size": 6, "num_hidden_layers": 2, "num_nextn_predict_layers": 2, "initializer_range": 0.4}
    return tiny_model(dtype=torch.float64, **{**shape, **changes})


@pytest.fixture
def smallest(tiny_model):
    """One dense layer and two MTP layers of width 8 over 6 tokens."""
    ranks = {"q_lora_rank": None, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    widths = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "initializer_range": 0.3}
    return small(tiny_model, num_hidden_layers=1, first_k_dense_replace=3, **ranks, **widths)


# --- the law of what is drawn


def triples(model, answers):
    """Counts of the first three tokens of sampled answers to one prompt, and how often 0, 1, 2 drafts were kept."""
    engine = Engine(model, None, max_batch=2_000, cache_tokens=50_000)
    params = [
        SamplingParams(temperature=0.8, top_k=5, seed=seed, max_tokens=4, ignore_eos=True) for seed in range(answers)
    ]
    texts, kept = {}, torch.zeros(3, dtype=torch.long)
    for event in engine.generate([Request([3, 1, 4], p) for p in params], speculate=2):
        texts.setdefault(event.request, []).extend(event.token_ids)
        if event.drafted == 2:
            kept[event.accepted] += 1
    tokens = torch.tensor([texts[row][:3] for row in range(answers)])
    return torch.bincount(tokens @ torch.tensor([36, 6, 1]), minlength=216), kept


@pytest.mark.parametrize("runner", [TorchRunner, None])
def test_drafts_that_are_no_numbers_cost_no_answer_and_a_trunk_that_is_none_gives_none(tiny_model, runner):
    model = tiny_model(num_nextn_predict_layers=1)
    request = Request([3, 1, 4], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))

    def answered(**how):
        return tokens_of(Engine(model, None, **({"runner": runner} if runner else {})).generate([request], **how))

    plain = answered()
    with torch.no_grad():
        model.mtp_layers[0].eh_proj.weight.fill_(torch.nan)
    assert answered(speculate=1) == plain
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    for params in (request.params, SamplingParams(max_tokens=0, prompt_logprobs=0)):
        with pytest.raises(UserError, match="no numbers"):
            Engine(model, None).complete([Request([3, 1, 4], params)])


@torch.no_grad()
def exact_triples(model):
    """The trunk's distribution of those triples, from full forwards over every prefix."""
    pairs = torch.tensor([[3, 1, 4, a, b] for a, b in itertools.product(range(6), repeat=2)])
    logits = model.logits(model(pairs).hidden_BTd)[:, 2:] / 0.8
    fifth = logits.topk(5).values[..., -1:]
    probs = logits.masked_fill(logits < fifth, -torch.inf).softmax(-1)
    p1, p2, p3 = probs[:, 0].gather(1, pairs[:, 3:4]), probs[:, 1].gather(1, pairs[:, 4:5]), probs[:, 2]
    return (p1 * p2 * p3).flatten()


MANY = pytest.param(100_000, marks=pytest.mark.slow)


@pytest.mark.parametrize("answers", [3_000, MANY])
def test_drafted_answers_follow_the_trunk(smallest, answers):
    counts, kept = triples(smallest, answers)
    assert chi_square_excess(counts, exact_triples(smallest)) < 4
    assert kept.min() > kept.sum() / 20


def keeps_every_draft(run, drawn, logprobs, experts, move_on=Run.move_on):
    drafts = run.job.drafts
    return move_on(run, [*drafts, drawn[len(drafts)]], logprobs, experts)


def one_noise_for_all_places(logits, places):
    return choose(logits, [place._replace(index=0) for place in places])


def one_noise_for_all_seeds(logits, places):
    return choose(logits, [place._replace(seed=0) for place in places])


@pytest.mark.parametrize("answers", [1_500, MANY])
@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (Run, "move_on", keeps_every_draft),
        (baleen.infer.step, "choose", one_noise_for_all_places),
        (baleen.infer.step, "choose", one_noise_for_all_seeds),
    ],
)
def test_another_law_is_caught(smallest, monkeypatch, owner, name, broken, answers):
    monkeypatch.setattr(owner, name, broken)
    counts, _ = triples(smallest, answers)
    assert chi_square_excess(counts, exact_triples(smallest)) > 8


def test_two_distributions_agree_as_often_as_the_theory_says():
    """Gumbel noise in common: P(agree) = sum_i 1 / sum_j max(p_j / p_i, q_j / q_i), arXiv 2408.07978 §3."""
    generator = torch.Generator().manual_seed(5)
    p, q = (torch.randn(7, generator=generator).double().mul(1.5).softmax(-1) for _ in range(2))
    places = [Place(SamplingParams(), 1, (), index) for index in range(40_000)]
    agreed = choose(p.log().expand(40_000, -1), places) == choose(q.log().expand(40_000, -1), places)
    theory = (1 / torch.maximum(p / p[:, None], q / q[:, None]).sum(1)).sum()
    distance = (p - q).abs().sum() / 2
    assert (1 - distance) / (1 + distance) <= theory <= 1 - distance
    assert agreed.double().mean().item() == pytest.approx(theory.item(), abs=4 * 0.5 / 200)


# --- the same answers


@pytest.mark.parametrize("depth", [1, 2, 3, "auto"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafted_is_plain(tiny_model, depth, temperature):
    engine = Engine(small(tiny_model, num_nextn_predict_layers=3), ByteTokenizer(), prefill_chunk=9)
    generator = torch.Generator().manual_seed(8)
    requests = [
        Request(
            torch.randint(0, 6, (n,), generator=generator).tolist(),
            SamplingParams(temperature=temperature, top_p=0.95, seed=n, max_tokens=60, ignore_eos=True),
        )
        for n in (1, 2, 3, 7, 20)
    ]
    plain = engine.generate(requests)
    drafted = engine.generate(requests, speculate=depth)
    assert tokens_of(plain) == tokens_of(drafted)
    assert sum(drafted.stats.accepted) > 0
    assert drafted.stats.turns < plain.stats.turns


def test_in_float32_only_ties_may_differ(tiny_model):
    """The rule of twins: another token only where the two best logits, or a routing margin, lie within 1e-4."""
    model = tiny_model(num_nextn_predict_layers=2)
    engine = Engine(model, ByteTokenizer(), runner=TorchRunner)
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
    """After any mixture of acceptances, chunks of prompts included, the caches are those of a forward over the text."""
    model = small(tiny_model, num_nextn_predict_layers=3)
    engine = Engine(model, None, speculate=depth, page_size=4, prefill_chunk=5)
    prompts = [[1], [2, 3], [0, 5, 1, 4, 4, 2, 3, 0, 0, 1, 2, 5, 4], [1, 2]]
    ids = [
        engine.submit(Request(p, SamplingParams(temperature=temperature, seed=i, ignore_eos=True)))
        for i, p in enumerate(prompts)
    ]
    kept = set()
    for step in range(14):
        if step == 8:
            engine.abort(ids.pop(1))
        kept |= {event.accepted for event in engine.step() if event.drafted}
        for job in engine._scheduler.running:
            assert_true_cache(model, engine, job, depth)
    assert kept >= {0, 1}


@torch.no_grad()
def assert_true_cache(model, engine, job, depth):
    """Trunk rows of all tokens but the last; MTP layer k's of those for which t_{i+k} is known."""
    ids = torch.tensor([job.tokens[: job.computed + 1]])
    n = job.computed + 1
    fresh = LatentPages(model.config, 1, page_size=n, mtp=True, dtype=torch.float64)
    hidden = model(ids, cache=fresh.view(Batch(ids[0].tolist(), [0], [n], [[0]]))).hidden_BTd
    for k in range(1, min(depth, n - 1) + 1):
        batch = Batch(ids[0, k:].tolist(), [0], [n - k], [[0]])
        hidden = model.predict_ahead(k - 1, hidden[:, : n - k], ids[:, k:], cache=fresh.view(batch)).hidden_BTd
    layers = model.config.num_hidden_layers
    for layer in range(layers + depth):
        true = max(0, n - 1 - max(0, layer - layers))
        kept = latents_of(engine).latents[layer, job.pages].flatten(0, 1)[:true]
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
    assert (stats.turns, stats.drafted, stats.accepted) == (10, [10, 10], [10, 10])
    assert stats.acceptance == [1.0, 1.0] and stats.tokens_per_step == 3.0


def test_events_say_which_tokens_were_drafts(tiny_model):
    engine = Engine(counting_model(tiny_model), ByteTokenizer())
    events = list(engine.generate([Request([5], SamplingParams(temperature=0, max_tokens=6))], speculate=2))
    assert [(len(event.token_ids), event.accepted) for event in events] == [(1, 0), (3, 2), (2, 1)]


@pytest.mark.parametrize("before", [0, 2])
def test_a_prefix_read_without_drafts_is_no_worse_for_drafts(tiny_model, monkeypatch, before):
    """Pages that the MTP layers have not read hold nothing for them; those that they have are shared."""
    prompt, params = [(7 * i) % 12 for i in range(41)], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    model, made = small(tiny_model, vocab_size=12), []
    true_draft = baleen.infer.step.Stepper._draft

    def watched(self, runs, hidden_Nd):
        pays = true_draft(self, runs, hidden_Nd)
        made[-1].extend(tuple(run.job.drafts) for run in runs)
        return pays

    monkeypatch.setattr(baleen.infer.step.Stepper, "_draft", watched)
    engines = [Engine(model, None, page_size=8) for _ in range(2)]
    for engine, first in zip(engines, (None, before), strict=True):
        made.append([])
        if first is not None:
            engine.complete([Request([*prompt, 5], params)], speculate=first)
            made[-1].clear()
        (answer,) = engine.complete([Request(prompt, params)], speculate=2)
    assert answer.cached_tokens == (40 if before else 0)
    if before:  # what was found is as good, but for the last row, which saw another token behind it
        keys: list[bytes] = []
        for start in range(0, 40, 8):
            keys.append(page_key(keys[-1] if keys else DRAFTED, prompt[start : start + 8]))
        fresh, shared = (latents_of(e).latents[:, e.pages.find(keys)].flatten(1, 2) for e in engines)
        assert fresh.shape[1] == shared.shape[1] == 40
        torch.testing.assert_close(shared[:, :39], fresh[:, :39], rtol=1e-9, atol=1e-11)
    else:
        assert made[0] == made[1] and any(made[0])


def test_adaptive_answers_that_stop_drafting_share_no_page_that_was_not_read(tiny_model, monkeypatch):
    monkeypatch.setattr(Payoff, "drafts", lambda self, rows: False)
    engine = Engine(small(tiny_model, vocab_size=12), None, page_size=8)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    (answer,) = engine.complete([Request([1] * 17, params)], speculate="auto")
    (again,) = engine.complete([Request([1] * 17 + list(answer.token_ids), params)], speculate="auto")
    assert again.cached_tokens == 16  # the prompt's two pages, none of the answer's


def test_answers_that_cannot_be_drafted_for_teach_nothing_about_drafting(tiny_model, monkeypatch):
    observed = []
    monkeypatch.setattr(Payoff, "observe", lambda self, rows, *rest: observed.append(rows))
    engine = Engine(small(tiny_model, vocab_size=12), None, page_size=8)
    penalised = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, frequency_penalty=0.5)
    engine.complete([Request([1] * 5, penalised)], speculate="auto")
    assert not observed
    engine.complete([Request([1] * 5, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))], speculate="auto")
    assert observed


def test_answers_that_end_early_share_no_page_that_was_not_read(tiny_model):
    """What ends with its first token is not drafted for."""
    engine = Engine(small(tiny_model, vocab_size=12), None, page_size=8)
    first = SamplingParams(temperature=0, max_tokens=9)
    end = engine.complete([Request([1] * 17, first)])[0].token_ids[0]
    engine.complete([Request([1] * 17, SamplingParams(temperature=0, max_tokens=9, stop_ids=(end,)))], speculate=2)
    (answer,) = engine.complete([Request([1] * 17, first)], speculate=2)
    assert answer.cached_tokens == 0
    (answer,) = engine.complete([Request([1] * 17, first)], speculate=2)
    assert answer.cached_tokens == 16


def test_acceptance_none(tiny_model):
    engine = Engine(counting_model(tiny_model, wrong_after=range(12)), ByteTokenizer())
    generation = engine.generate([Request([5], SamplingParams(temperature=0, max_tokens=31))], speculate=1)
    assert tokens_of(generation)[0] == [(6 + i) % 12 for i in range(31)]
    assert (generation.stats.turns, generation.stats.accepted) == (30, [0])
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
    assert (generation.stats.turns, generation.stats.accepted) == (steps, [accepted])
    assert generation.stats.tokens_per_step == 1 + accepted / steps


def test_drafting_turns_itself_off_and_on():
    """By the clock alone, apart for small and large batches, with a few trials of the slower way."""
    payoff = Payoff()

    def share(rows, seconds_drafting, steps):
        drafted = 0
        for _ in range(steps):
            drafts = payoff.drafts(rows)
            payoff.observe(rows, drafts, rows * (2 if drafts else 1), seconds_drafting if drafts else 1.0)
            drafted += drafts
        return drafted / steps

    assert share(1, 1.5, 600) > 0.9  # twice the tokens in 1.5 times the time
    assert 0 < share(32, 2.5, 600) < 0.1
    assert share(1, 1.5, 300) > 0.9
    assert share(1, 9.0, 3_000) < 0.2  # the text has changed
