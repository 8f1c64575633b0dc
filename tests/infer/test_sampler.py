"""Processors and draws, held to plain loops over one row."""

import math

import pytest
import torch
from chi_square import chi_square_excess
from needs import needs_native

from baleen.config import UserError
from baleen.infer import sampler
from baleen.infer.native.library import native_library
from baleen.infer.sampler import Place, SamplingParams, _keys, choose, gumbel


def reference(logits, params):
    """The processors one at a time, as lists."""
    if params.temperature == 0:
        return [float(i == max(range(len(logits)), key=lambda j: logits[j])) for i in range(len(logits))]
    weights = [torch.tensor(x / params.temperature, dtype=torch.float64).exp().item() for x in logits]
    probs = {i: w / sum(weights) for i, w in enumerate(weights)}
    ranked = sorted(probs, key=lambda i: -probs[i])
    if params.top_k:
        ranked = ranked[: params.top_k]
    if params.top_p < 1:
        total, kept, reached = sum(probs[i] for i in ranked), [], 0.0
        for i in ranked:
            if reached < params.top_p * total:
                kept.append(i)
            reached += probs[i]
        ranked = kept
    ranked = [i for i in ranked if probs[i] >= params.min_p * max(probs.values())]
    total = sum(probs[i] for i in ranked)
    return [probs[i] / total if i in ranked else 0.0 for i in range(len(logits))]


MIXTURE = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=3),
    SamplingParams(top_k=1000),
    SamplingParams(top_p=0.6),
    SamplingParams(top_p=1e-9),
    SamplingParams(min_p=0.2),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=2.0, top_k=9, top_p=0.8, min_p=0.05),
]


DRAWS = 20_000


def draws(logits, params, count=DRAWS, seed=0):
    """How often each token is drawn at `count` places of one answer."""
    places = [Place(params, seed, (), index) for index in range(count)]
    return torch.bincount(choose(logits.expand(count, -1), places), minlength=len(logits))


@pytest.mark.parametrize("params", MIXTURE)
def test_draws_follow_the_reference(params):
    logits = torch.randn(17, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    expected = torch.tensor(reference(logits.tolist(), params), dtype=torch.float64)
    assert chi_square_excess(draws(logits, params), expected) < 4


@pytest.mark.parametrize("changed", [{"temperature": 0.8}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.1}])
def test_another_distribution_is_caught(changed):
    logits = torch.randn(17, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    expected = torch.tensor(reference(logits.tolist(), SamplingParams()), dtype=torch.float64)
    assert chi_square_excess(draws(logits, SamplingParams(**changed)), expected) > 8


@pytest.mark.parametrize("params", [SamplingParams(top_k=380, top_p=0.95), SamplingParams(top_p=0.97, temperature=2.0)])
def test_a_nucleus_beyond_the_first_candidates(params):
    """More than 256 tokens are in: then the whole vocabulary is sorted."""
    logits = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2
    expected = torch.tensor(reference(logits.tolist(), params), dtype=torch.float64)
    assert (expected > 0).sum() > 256
    assert chi_square_excess(draws(logits, params, 8_000), expected) < 4


def test_a_row_does_not_depend_on_the_others():
    logits = torch.randn(len(MIXTURE), 400, generator=torch.Generator().manual_seed(0)) * 3
    places = [Place(params, seed, (), 5) for seed, params in enumerate(MIXTURE)]
    together = choose(logits, places).tolist()
    assert together == [int(choose(logits[r : r + 1], places[r : r + 1])) for r in range(len(places))]


def test_noise_depends_on_seed_place_and_token():
    ids = torch.arange(1000, dtype=torch.int32)
    logits = torch.zeros(1, 1000)
    drawn = {(s, i): int(choose(logits, [Place(SamplingParams(), s, (), i)])) for s in range(4) for i in range(4)}
    assert len(set(drawn.values())) >= 14  # 16 of 1,000 rarely coincide
    keys = torch.tensor([[1, 0], [2, 0], [1, 1]], dtype=torch.int32)
    noise = gumbel(keys, ids)
    assert torch.equal(noise[1:2], gumbel(keys[1:2], ids)) and len(noise.unique()) == 3000
    assert torch.equal(noise[:, 3:5], gumbel(keys, ids[3:5]))


def test_noise_is_gumbel_and_uncorrelated():
    """A million numbers, over consecutive places of consecutive seeds: moments, and neighbours in every direction."""
    places = [Place(SamplingParams(), seed, (), index) for seed in range(32) for index in range(32)]
    noise = gumbel(_keys(places, torch.device("cpu")), torch.arange(1024, dtype=torch.int32)).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.006) and noise.var().item() == pytest.approx(
        math.pi**2 / 6, abs=0.02
    )
    uniform = (-(-noise).exp()).exp()
    counts = torch.histc(uniform, 256, 0, 1)
    assert chi_square_excess(counts.long(), torch.full((256,), 1 / 256, dtype=torch.float64)) < 4
    grid = (uniform - 0.5).view(32, 32, 1024) * math.sqrt(12)
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid[..., 1:], grid[..., :-1])):
        assert abs((a * b).mean().item()) < 0.004  # four standard deviations
    assert noise.isfinite().all()


def test_the_ends_of_the_noise_are_finite():
    every = torch.arange(-(2**31), 2**31, 2**12 + 1, dtype=torch.int64).int()
    assert gumbel(torch.zeros(1, 2, dtype=torch.int32), every).isfinite().all()
    one = torch.full((3000, 4), -math.inf)
    one[:, 2] = 0.0
    assert set(choose(one, [Place(SamplingParams(), 0, (), i) for i in range(3000)]).tolist()) == {2}


@needs_native
@pytest.mark.parametrize("vocab", [1, 5, 16, 276, 1003])
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 30.0])
def test_the_native_draw_is_its_twins(monkeypatch, vocab, spread):
    """Token for token, at flat and at peaked distributions, with forbidden tokens, in rows of a padded matrix."""
    logits = torch.randn(2000, vocab + 7, generator=torch.Generator().manual_seed(vocab)) * spread
    logits[:, 3::5] = -math.inf
    logits = logits[:, :vocab]
    places = [Place(SamplingParams(temperature=0.3 + r % 5), r * 7919, (), r) for r in range(len(logits))]
    asked = []
    monkeypatch.setattr(sampler, "native_library", lambda: asked.append(1) or native_library())
    fast = choose(logits, places)
    assert asked
    monkeypatch.setattr(sampler, "native_library", lambda: None)
    assert torch.equal(fast, choose(logits, places))
    monkeypatch.undo()
    forbidden = choose(torch.full((2, vocab), -math.inf), places[:2])
    assert torch.equal(forbidden, torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_what_is_no_number_is_drawn_so_that_it_is_noticed(monkeypatch, params, native):
    if not native:
        monkeypatch.setattr(sampler, "native_library", lambda: None)
    logits = torch.randn(3, 40)
    logits[1, 17] = math.nan
    for spoilt, rows in ((logits, [1]), (torch.full((3, 40), math.nan), [0, 1, 2])):
        drawn = choose(spoilt, [Place(SamplingParams(**params), 0, (), i) for i in range(3)])
        assert [row for row in range(3) if spoilt[row, drawn[row]].isnan()] == rows


def test_logits_are_not_changed():
    logits = torch.randn(2, 5)
    before = logits.clone()
    params = SamplingParams(top_p=0.5, logit_bias={1: 3.0}, presence_penalty=1.0)
    choose(logits, [Place(params, 0, (1, 1), 2)] * 2)
    assert torch.equal(logits, before)


def test_bias_and_penalties():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    answer = (3, 3, 2)

    def best(**changes):
        params = SamplingParams(temperature=0, **changes)
        return int(choose(logits, [Place(params, 0, answer, 3)]))

    assert best() == 3
    assert best(logit_bias={0: 3.5}) == 0
    assert best(logit_bias={3: -100.0}) == 2
    assert best(presence_penalty=1.5) == 3 and best(presence_penalty=-9.0) == 3  # 3 and 2 alike, 1 and 0 not
    assert best(presence_penalty=2.1) == 1
    assert best(frequency_penalty=0.9) == 3 and best(frequency_penalty=1.01) == 1  # 3 - 2.02, 2 - 1.01, 1
    assert best(frequency_penalty=1.01, logit_bias={2: 0.5}) == 2


class Even:
    """Only even tokens may follow an odd number of them, and anything an even number; knows but four tokens."""

    def allowed(self, answer_ids):
        return torch.tensor([True, False, True, False]) if len(answer_ids) % 2 else None


def test_constraint():
    logits = torch.arange(6.0)[None]
    params = SamplingParams(temperature=0, constraint=Even())
    assert int(choose(logits, [Place(params, 0, (), 0)])) == 5
    assert int(choose(logits, [Place(params, 0, (1,), 1)])) == 2
    drawn = choose(logits.expand(200, -1), [Place(SamplingParams(constraint=Even()), 0, (1,), i) for i in range(200)])
    assert set(drawn.tolist()) == {0, 2}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"max_tokens": 0},
        {"max_tokens": -1, "prompt_logprobs": 0},
        {"logprobs": -1},
        {"prompt_logprobs": -1},
        {"logit_bias": {1: float("inf")}},
        {"stop": ("a", "")},
    ],
)
def test_impossible_parameters(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)).replace("_", ".")):
        SamplingParams(**wrong)


def test_a_temperature_by_which_nothing_can_be_divided_is_greedy():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=1e-40)
    assert choose(logits, [Place(params, 1, (), 0)]).tolist() == logits.argmax(-1).tolist() and params.temperature == 0


def test_one_stop_string_is_not_a_list_of_letters():
    assert SamplingParams(stop="end").stop == ("end",)
