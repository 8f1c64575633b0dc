"""Processors and draws, held to plain loops over one row."""

import pytest
import torch

from baleen.config import UserError
from baleen.infer.sampler import Sampler, SamplingParams, draw, probabilities


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


def test_processors_equal_reference():
    logits = torch.randn(len(MIXTURE), 2, 17, generator=torch.Generator().manual_seed(0)) * 2
    together = Sampler(MIXTURE).probabilities(logits)
    for row, params in enumerate(MIXTURE):
        alone = Sampler([params]).probabilities(logits[row : row + 1])[0]
        for place in range(2):
            expected = torch.tensor(reference(logits[row, place].tolist(), params), dtype=torch.float64)
            torch.testing.assert_close(together[row, place], expected, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(alone[place], expected, rtol=1e-6, atol=1e-9)


def test_processors_are_pure():
    logits = torch.randn(2, 1, 5)
    before = logits.clone()
    probabilities(logits, torch.tensor([0.0, 1.0]), torch.tensor([0, 2]), torch.tensor([1.0, 0.5]))
    assert torch.equal(logits, before)


def test_draw_inverts_the_distribution():
    weights = torch.tensor([[0.0, 2.0, 0.0, 1.0, 1.0, 0.0]], dtype=torch.float64).expand(6, -1)
    uniform = torch.tensor([0.0, 0.4999, 0.5, 0.75, 1 - 2**-53, 0.1], dtype=torch.float64)
    assert draw(weights, uniform).tolist() == [1, 1, 3, 4, 4, 1]


def test_streams_do_not_depend_on_the_batch():
    a, b, c = (SamplingParams(seed=seed) for seed in (1, 2, 3))
    batch = Sampler([a, b, c])
    first = batch.uniforms(2)
    batch.select([2, 0])
    second = batch.uniforms(3)
    alone = Sampler([c])
    assert torch.equal(alone.uniforms(2)[0], first[2]) and torch.equal(alone.uniforms(3)[0], second[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(Sampler([SamplingParams()]).uniforms(4), Sampler([SamplingParams()]).uniforms(4))


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
        {"stop": ("a", "")},
    ],
)
def test_impossible_parameters(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)).replace("_", ".")):
        SamplingParams(**wrong)


def test_one_stop_string_is_not_a_list_of_letters():
    assert SamplingParams(stop="end").stop == ("end",)
