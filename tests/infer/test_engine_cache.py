"""One cache for all: reuse, chunks, giving way and aborting change no answer and leak no page; and what is reported."""

import random

import pytest
import torch
from toy import ByteTokenizer, latents_of

from baleen.config import UserError
from baleen.infer.engine import Busy, Engine, Request
from baleen.infer.sampler import SamplingParams


@pytest.fixture
def engine(tiny_model):
    """Makes an engine over a small float64 model of bytes with two MTP layers."""
    model = tiny_model(dtype=torch.float64, vocab_size=258, num_hidden_layers=2, num_nextn_predict_layers=2)
    return lambda **options: Engine(model, ByteTokenizer(), **options)


def text(length, seed=0):
    return random.Random(seed).choices(range(250), k=length)


def drawn(seed=1, **changes):
    return SamplingParams(**{"seed": seed, "top_p": 0.95, "max_tokens": 12, "ignore_eos": True, **changes})


def finish(engine):
    """All events of what is under way, by request."""
    events = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request, []).append(event)
    return events


def ids_of(events):
    return tuple(id for event in events for id in event.token_ids)


@pytest.mark.parametrize("speculate", [0, 2])
def test_a_known_prefix_is_not_computed_again(engine, speculate):
    """Nor in the next turn of a conversation, answer included."""
    warm, params = engine(speculate=speculate, page_size=4), drawn()
    shapes = []
    warm.model.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape[1]))
    first = text(21)
    (answer,) = warm.complete([Request(first, params)], speculate=speculate)
    assert answer.cached_tokens == 0 and shapes[0] == 21
    second = [*first, *answer.token_ids, *text(6, seed=1)]  # 39 tokens, of which the last said was never read
    shapes.clear()
    (again,) = warm.complete([Request(second, params)], speculate=speculate)
    known = 28 if speculate else 32  # the MTP layers do not read an answer's end
    assert again.cached_tokens == known and shapes[0] == 39 - known
    assert again == engine(page_size=4).complete([Request(second, params)])[0]
    assert warm.pages.in_use == 0


def test_equal_prompts_at_once_are_read_once(engine):
    """A group of rollouts: all but the first find the prompt's full pages."""
    many, prompt = engine(page_size=4), text(22)
    shapes = []
    many.model.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape[1]))
    requests = [Request(prompt, drawn(seed)) for seed in range(8)]
    answers = many.complete(requests)
    assert [a.cached_tokens for a in answers] == [0] + [20] * 7
    assert shapes[:2] == [22, 1 + 7 * 2]
    assert answers == [engine().complete([request])[0] for request in requests]
    assert len({a.token_ids for a in answers}) == 8


@pytest.mark.parametrize(
    "chunk", [pytest.param(1, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow), 16, 64]
)
def test_chunks_change_nothing(engine, chunk):
    whole, parts = engine(), engine(prefill_chunk=chunk, page_size=8)
    requests = [Request(text(n, seed=n), drawn(n, logprobs=1)) for n in (40, 1, 17, 33)]
    plain = whole.complete(requests)
    cut = parts.complete(requests, speculate=2)
    assert [c.token_ids for c in cut] == [c.token_ids for c in plain]
    for a, b in zip(cut, plain, strict=True):
        assert [x.logprob for x in a.logprobs] == pytest.approx([x.logprob for x in b.logprobs], abs=1e-9)


@pytest.mark.parametrize("speculate", [1, 2])
def test_giving_way_changes_nothing(engine, speculate):
    """More requests than the cache holds at once: the youngest are put back and go on later."""
    small = engine(cache_tokens=64, page_size=4, speculate=speculate)
    starts = []
    forward = small._stepper.runner.draft
    small._stepper.runner.draft = lambda k, x, batch: starts.extend(batch.starts) or forward(k, x, batch)
    requests = [Request(text(9, seed=n), drawn(n, max_tokens=30, trace=True, logprobs=0)) for n in range(6)]
    ids = [small.submit(request) for request in requests]
    put_back, waiting = 0, small.waiting
    events = {id: [] for id in ids}
    while small.has_work:
        for event in small.step():
            events[event.request].append(event)
        put_back += small.waiting > waiting
        waiting = small.waiting
    assert put_back > 0 and min(starts) >= 0 and latents_of(small).latents.isfinite().all()
    plain = engine().complete(requests)
    for id, alone in zip(ids, plain, strict=True):
        assert ids_of(events[id]) == alone.token_ids
        assert "".join(event.text for event in events[id]) == alone.text
        assert sum(len(event.routes) for event in events[id] if event.routes is not None) == 29
        assert {event.cached_tokens for event in events[id]} == {0}
    assert small.pages.in_use == 0


def test_abort_frees_the_pages_at_once(engine):
    e = engine(max_batch=2, page_size=4)
    ids = [e.submit(Request(text(10, seed=n), drawn(n))) for n in range(4)]
    e.step()
    held = e.pages.in_use
    assert (e.running, e.waiting) == (2, 2) and held >= 6
    e.abort(ids[0])
    e.abort(ids[2])
    assert (e.running, e.waiting) == (1, 1) and e.pages.in_use == held // 2
    e.abort(ids[0])  # once more is no fault, nor is one unheard of
    e.abort(99)
    events = finish(e)
    assert set(events) == {ids[1], ids[3]} and e.pages.in_use == 0


def test_abandoned_generation_frees_its_pages(engine):
    e = engine()
    other = e.submit(Request(text(5), drawn(max_tokens=40)))
    alone = engine().complete([Request(text(5), drawn(max_tokens=40))])[0]
    generation = iter(e.generate([Request(text(9), drawn())] * 3))
    next(generation)
    assert e.running == 4
    generation.close()
    assert e.running == 1
    events = finish(e)
    assert alone.token_ids[-len(ids_of(events[other])) :] == ids_of(events[other])
    assert e.pages.in_use == 0


def test_events_reach_their_own(engine):
    """Two generations and a submitted request in one engine at once."""
    e = engine()
    requests = [Request(text(7, seed=n), drawn(n)) for n in range(3)]
    alone = [engine().complete([request])[0].token_ids for request in requests]
    submitted = e.submit(requests[0])
    a, b = iter(e.generate([requests[1]])), iter(e.generate([requests[2]], speculate=1))
    got = {1: [], 2: []}
    for _ in range(12):
        got[1] += next(a, None).token_ids if len(got[1]) < 12 else ()
        got[2] += next(b, None).token_ids if len(got[2]) < 12 else ()
    assert tuple(got[1]) == alone[1] and tuple(got[2]) == alone[2]
    assert ids_of(finish(e)[submitted]) == alone[0]  # its events waited while the others took the steps


def test_queue_bounds(engine):
    now = [0.0]
    e = engine(max_batch=1, max_queue=2, queue_seconds=5.0, clock=lambda: now[0])
    first = e.submit(Request(text(4), drawn()))
    e.step()
    late, later = (e.submit(Request(text(4), drawn())) for _ in range(2))
    with pytest.raises(Busy):
        e.submit(Request(text(4), drawn()))
    now[0] = 6.0
    events = e.step()
    assert {event.request: event.finish_reason for event in events} == {first: None, late: "timeout", later: "timeout"}
    assert set(finish(e)) == {first} and not e.has_work


def test_what_expires_is_not_admitted_in_the_same_step(engine):
    now = [0.0]
    e = engine(max_batch=1, queue_seconds=5.0, clock=lambda: now[0])
    first = e.submit(Request(text(4), drawn(max_tokens=1)))
    late = e.submit(Request(text(4), drawn()))
    assert [event.request for event in e.step()] == [first]  # which frees the slot
    now[0] = 6.0
    assert [(event.request, event.finish_reason) for event in e.step()] == [(late, "timeout")]
    assert not e.has_work and e.pages.in_use == 0


@pytest.mark.parametrize("name", ["max_batch", "prefill_chunk"])
def test_an_engine_that_could_do_nothing(engine, name):
    with pytest.raises(UserError, match=f"{name} is 0"):
        engine(**{name: 0})


def test_without_a_length_an_answer_takes_what_the_cache_holds(engine):
    (answer,) = engine(cache_tokens=64).complete([Request(text(10), drawn(max_tokens=None))])
    assert len(answer.token_ids) == 54 and answer.finish_reason == "length"


def test_a_request_that_never_fits(engine):
    e = engine(cache_tokens=32)
    with pytest.raises(UserError, match="may grow to 40 tokens, but the cache holds 32"):
        e.submit(Request(text(10), drawn(max_tokens=30)))
    assert len(e.complete([Request(text(10), drawn(max_tokens=22))], speculate=2)[0].token_ids) == 22
    assert not e.complete([Request(text(32), drawn(max_tokens=0, prompt_logprobs=0))])[0].token_ids


@torch.no_grad()
def test_logprobs_are_the_models_own(engine):
    """Before temperature, bias and penalties, of every token of the answer, drafts that were kept included."""
    e = engine()
    prompt = text(6)
    params = drawn(logprobs=3, temperature=1.7, logit_bias={5: 2.0}, frequency_penalty=0.5)
    for answer in (
        e.complete([Request(prompt, params)])[0],
        e.complete([Request(prompt, drawn(logprobs=3))], speculate=2)[0],
    ):
        ids = [*prompt, *answer.token_ids]
        log_probs = e.model.logits(e.model(torch.tensor([ids])).hidden_BTd)[0].log_softmax(-1)
        assert [x.token_id for x in answer.logprobs] == list(answer.token_ids)
        for at, found in enumerate(answer.logprobs, len(prompt) - 1):
            assert found.logprob == pytest.approx(log_probs[at, found.token_id].item(), abs=1e-9)
            best = log_probs[at].topk(3)
            assert [id for id, _ in found.top] == best.indices.tolist()
            assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-9)
    silent = e.complete([Request(prompt, drawn())])[0]
    assert silent.logprobs is None and silent.prompt_logprobs is None


@torch.no_grad()
@pytest.mark.parametrize("chunk", [4, 512])
def test_prompt_logprobs(engine, chunk):
    e = engine(prefill_chunk=chunk, page_size=4)
    ids = text(19)
    log_probs = e.model.logits(e.model(torch.tensor([ids])).hidden_BTd)[0].log_softmax(-1)
    for start, cached in ((0, 0), (14, 12), (19, 16)):
        params = drawn(max_tokens=0, prompt_logprobs=2, prompt_logprobs_from=start)
        (scored,) = e.complete([Request(ids, params)])
        first = max(1, start)
        assert (scored.text, scored.token_ids, scored.finish_reason) == ("", (), "length")
        assert [x.token_id for x in scored.prompt_logprobs] == ids[first:]
        expected = [log_probs[t - 1, ids[t]].item() for t in range(first, 19)]
        assert [x.logprob for x in scored.prompt_logprobs] == pytest.approx(expected, abs=1e-9)
        assert all(len(x.top) == 2 for x in scored.prompt_logprobs)
        assert scored.cached_tokens == cached  # the last time all was known, but for the hidden state to score with
    (both,) = e.complete([Request(ids, drawn(prompt_logprobs=0))])
    assert len(both.prompt_logprobs) == 18 and both.token_ids == engine().complete([Request(ids, drawn())])[0].token_ids


def test_a_whole_context_can_be_scored(engine):
    e = engine()
    ids = text(e.context)
    (scored,) = e.complete([Request(ids, SamplingParams(max_tokens=0, prompt_logprobs=0))])
    assert len(scored.prompt_logprobs) == e.context - 1
    with pytest.raises(UserError, match="context holds 256"):
        e.complete([Request(ids, SamplingParams(max_tokens=1, prompt_logprobs=0))])


@torch.no_grad()
@pytest.mark.parametrize("speculate", [0, 2])
def test_routes_are_those_of_a_forward_over_the_text(engine, speculate):
    e = engine(speculate=speculate, page_size=4)
    prompt = text(9)
    e.submit(Request(prompt, drawn()))  # no trace: nothing is reported
    traced = e.submit(Request(prompt, drawn(seed=2, trace=True)))
    events = finish(e)
    assert all(event.routes is None for id, own in events.items() if id != traced for event in own)
    ids = ids_of(events[traced])
    routes = torch.cat([event.routes for event in events[traced] if event.routes is not None])
    _, routings = e.model(torch.tensor([[*prompt, *ids]]))
    expected = torch.stack([routing.indices_NK for routing in routings], 1)[len(prompt) : -1]
    assert torch.equal(routes.long().sort(-1).values, expected.sort(-1).values)


class Digits:
    """The answer is made of the bytes 0 to 9, and ends after the fourth."""

    def allowed(self, answer_ids):
        mask = torch.zeros(258, dtype=torch.bool)
        mask[ord("0") : ord("9") + 1] = len(answer_ids) < 4
        mask[ByteTokenizer.eos_id] = len(answer_ids) >= 4
        return mask


def test_constraint_beside_free_answers(engine):
    e = engine()
    constrained = Request(text(8), drawn(constraint=Digits(), ignore_eos=False))
    free = Request(text(8), drawn(seed=5))
    first, second = e.complete([constrained, free], speculate=2)
    assert first.text.isdigit() and len(first.text) == 4 and first.finish_reason == "stop"
    assert second == engine().complete([free])[0]


def test_bad_bias(engine):
    with pytest.raises(UserError, match="logit_bias names token 258"):
        engine().submit(Request([1], SamplingParams(logit_bias={258: 1.0})))


def test_stop_strings_need_a_tokenizer(engine):
    e = Engine(engine().model, None)
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        e.submit(Request([1], SamplingParams(stop=("a",))))
    answer = e.complete([Request(text(4), drawn())])[0]
    assert answer.text == "" and answer.token_ids == engine().complete([Request(text(4), drawn())])[0].token_ids


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4, 5))])
def test_random_life(engine, seed):
    """Requests come, are aborted, wait and give way in random order: each answer is the one it gets alone."""
    rng = random.Random(seed)
    e = engine(
        cache_tokens=rng.choice([80, 200, 1000]),
        max_batch=rng.choice([2, 5, 50]),
        prefill_chunk=rng.choice([3, 10, 100]),
        page_size=rng.choice([2, 4, 16]),
        speculate=rng.choice([0, 1, 2, "auto"]),
    )
    stock = [text(rng.randrange(1, 40), seed=n) for n in range(4)]
    live, ended, said = {}, {}, {}
    for _ in range(60):
        if rng.random() < 0.3:
            prompt = rng.choice(stock)[: rng.randrange(1, 40)] + text(rng.randrange(3), seed=rng.random())
            params = drawn(
                rng.randrange(100),
                temperature=rng.choice([0, 1.0]),
                max_tokens=rng.randrange(1, 20),
                presence_penalty=rng.choice([0.0, 0.0, 1.0]),
            )
            request = Request(prompt, params)
            id = e.submit(request)
            live[id], said[id] = request, []
        elif rng.random() < 0.1 and live:
            id = rng.choice(list(live))
            e.abort(id)
            del live[id]
        for event in e.step():
            assert event.request in live
            said[event.request] += event.token_ids
            if event.finish_reason:
                ended[event.request] = live.pop(event.request)
        assert e.has_work == bool(live)
        assert e.pages.in_use <= e.pages.total
    for id, events in finish(e).items():
        said[id] += ids_of(events)
        ended[id] = live.pop(id)
    assert e.pages.in_use == 0 and not live and len(ended) > 8
    plain = engine().complete(list(ended.values()))
    assert [tuple(said[id]) for id in ended] == [answer.token_ids for answer in plain]


def test_a_token_takes_the_latents_of_its_layers(engine):
    """Those of the MTP layers too, for any request may ask for drafts; but a CPU gives them room only once it does."""
    e = engine(page_size=4)
    latents, config = latents_of(e).latents, e.model.config
    width = (config.kv_lora_rank + config.qk_rope_head_dim) * latents.element_size()
    layers = config.num_hidden_layers
    assert latents_of(e).bytes_per_token == (layers + 2) * width
    e.complete([Request(text(9), drawn())])
    assert latents[:layers].any() and not latents[layers:].any()
    e.complete([Request(text(9), drawn())], speculate=2)
    assert all(layer.any() for layer in latents)
