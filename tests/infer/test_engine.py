"""Batched = single, end reasons, text, limits and counts of the engine."""

import pytest
import torch
from toy import ByteTokenizer

from baleen.config import UserError
from baleen.infer.engine import Engine, Request
from baleen.infer.sampler import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture
def engine(tiny_model):
    """Makes an engine over a small float64 model of bytes."""

    def make(**changes):
        shape = {"vocab_size": 258, "num_hidden_layers": 2, **changes}
        return Engine(tiny_model(dtype=torch.float64, **shape), ByteTokenizer())

    return make


def prompts(*lengths, vocab_size=250):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def plain_greedy(model, prompt, count):
    """No cache, no batch: the slow twin."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.logits(model(torch.tensor([ids])).hidden_BTd[0, -1]).argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("speculate", [0, 1, 2])
def test_greedy_batch_equals_plain_loop(engine, speculate):
    engine = engine(num_nextn_predict_layers=2)
    mixed = prompts(1, 9, 2, 30, 5)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (24, 3, 1, 11, 17)]
    requests = [Request(ids, p) for ids, p in zip(mixed, params, strict=True)]
    for request, completion in zip(requests, engine.complete(requests, speculate=speculate), strict=True):
        assert completion.token_ids == plain_greedy(engine.model, request.prompt_ids, request.params.max_tokens)
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("speculate", [0, 1])
def test_sampling_does_not_depend_on_the_batch(engine, speculate):
    engine = engine()
    params = [
        SamplingParams(seed=1, max_tokens=20),
        SamplingParams(seed=2, max_tokens=7, top_p=0.9),
        SamplingParams(seed=3, max_tokens=20, top_k=20, temperature=1.5),
    ]
    requests = [Request(ids, p) for ids, p in zip(prompts(4, 11, 6), params, strict=True)]
    together = engine.complete(requests, speculate=speculate)
    assert together == engine.complete(requests[::-1], speculate=speculate)[::-1]
    assert together == [engine.complete([request], speculate=speculate)[0] for request in requests]
    assert len({completion.token_ids[:7] for completion in together}) == 3


def test_events_add_up(engine):
    engine = engine()
    generation = engine.generate([Request(ids, GREEDY) for ids in prompts(3, 8)], speculate=1)
    events = list(generation)
    for request in (0, 1):
        own = [event for event in events if event.request == request]
        ids = [id for event in own for id in event.token_ids]
        assert "".join(event.text for event in own) == ByteTokenizer().decode(ids)
        assert [event.finish_reason is None for event in own] == [True] * (len(own) - 1) + [False]
        assert own[0].accepted == 0 and all(event.accepted <= 1 for event in own)
    assert generation.stats.prompt_tokens == 11
    assert generation.stats.tokens == sum(len(event.token_ids) for event in events)
    assert generation.stats.seconds > 0 and generation.stats.tokens_per_second > 0


def test_end_token_and_stop_ids(engine):
    engine = engine()
    (prompt,) = prompts(5)
    free = engine.complete([Request(prompt, GREEDY)])[0].token_ids
    at = next(i for i in range(3, len(free)) if free[i] not in free[:i])
    stopped = engine.complete([Request(prompt, SamplingParams(temperature=0, stop_ids=(free[at],)))])[0]
    assert stopped.token_ids == free[: at + 1] and stopped.finish_reason == "stop"
    assert stopped.text == ByteTokenizer().decode(free[:at])
    tokenizer = ByteTokenizer()
    tokenizer.eos_id = free[at]
    ended = Engine(engine.model, tokenizer)
    assert ended.complete([Request(prompt, GREEDY)])[0] == stopped
    on = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    assert ended.complete([Request(prompt, on)])[0].token_ids == free


@pytest.mark.parametrize("speculate", [0, 1])
def test_stop_string(engine, speculate):
    engine = engine()
    (prompt,) = prompts(5)
    whole = engine.complete([Request(prompt, GREEDY)])[0]
    stop = whole.text[4:7]
    params = SamplingParams(temperature=0, max_tokens=24, stop=(stop, "never\0"))
    cut = engine.complete([Request(prompt, params)], speculate=speculate)[0]
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.find(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)] != whole.token_ids


def test_text_held_back_comes_out_at_the_end(engine):
    engine = engine()
    (prompt,) = prompts(5)
    whole = engine.complete([Request(prompt, GREEDY)])[0].text
    params = SamplingParams(temperature=0, max_tokens=24, stop=(whole[-1] + "\0",))
    assert engine.complete([Request(prompt, params)])[0].text == whole


@pytest.mark.parametrize("speculate", [0, 2])
def test_the_context_is_the_limit(engine, speculate):
    engine = engine(max_position_embeddings=16, num_nextn_predict_layers=2)
    params = SamplingParams(temperature=0, max_tokens=99, ignore_eos=True)
    completions = engine.complete([Request(ids, params) for ids in prompts(15, 10)], speculate=speculate)
    assert [len(c.token_ids) for c in completions] == [1, 6]
    assert {c.finish_reason for c in completions} == {"length"}
    with pytest.raises(UserError, match="16 tokens, but the model's context holds 16"):
        engine.generate([Request(ids) for ids in prompts(4, 16)])


def test_bad_requests(engine):
    engine = engine()
    with pytest.raises(UserError, match="empty"):
        engine.generate([Request([])])
    with pytest.raises(UserError, match="from 3 to 258, outside the model's vocabulary of 258"):
        engine.generate([Request([3, 258])])
    with pytest.raises(UserError, match="from -1"):
        engine.generate([Request([-1])])
    with pytest.raises(UserError, match="draft 2 tokens ahead, but the model has 1"):
        engine.generate([Request([1])], speculate=2)
    assert engine.complete([]) == []


def test_one_forward_a_step(engine):
    engine = engine()
    shapes = []
    engine.model.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    lengths = (2, 6, 6, 4)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    generation = engine.generate([Request(ids, p) for ids, p in zip(prompts(3, 8, 5, 5), params, strict=True)])
    list(generation)
    assert shapes == [(1, 21), (1, 4), (1, 3), (1, 3), (1, 2), (1, 2)]
    assert generation.stats.turns == 14
    assert generation.stats.tokens == sum(lengths) and generation.stats.tokens_per_step == 1.0
