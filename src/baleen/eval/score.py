"""Answers to a task's questions, and the share of right ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

from baleen.data.tokenizer import Tokenizer
from baleen.eval.likelihood import likelihoods
from baleen.eval.programs import pass_at_k, runs_without_fault
from baleen.eval.tasks import Choice, Cloze, Program, Question, Write
from baleen.infer.engine import Engine, Request
from baleen.infer.sampler import SamplingParams

SAMPLING_TEMPERATURE = 0.8
MOST_CHARS_PER_TOKEN = 64  # far above the mean of any tokenizer


def score_task(engine: Engine, questions: Sequence[Question], *, samples: int = 1, seed: int = 0) -> dict[str, float]:
    """{metric: value, ..., "questions": count} of a task, all of whose questions are of one kind.

    accuracy (choice, cloze; choices also by likelihood a byte) or exact_match, with its stderr; pass@k without one.
    perplexity is of a gap's tokens. samples: programs written for each question, one greedily, more at temperature 0.8.
    """
    choices = [q for q in questions if isinstance(q, Choice)]
    clozes = [q for q in questions if isinstance(q, Cloze)]
    writes = [q for q in questions if isinstance(q, Write)]
    programs = [q for q in questions if isinstance(q, Program)]
    assert len(questions) in map(len, (choices, clozes, writes, programs)), "a task has one kind of question"
    if choices:
        return _score_choices(engine, choices)
    if clozes:
        return _score_clozes(engine, clozes)
    if writes:
        requests = [_request(engine, q.prompt, (q.stop,), q.max_tokens, 0.0, seed) for q in writes]
        texts = [completion.text.strip() for completion in engine.complete(requests)]
        right = [text in map(str.strip, q.answers) for text, q in zip(texts, writes, strict=True)]
        return _share("exact_match", right)
    return _score_programs(engine, programs, samples, seed)


def beginning(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a prompt: with what begins a document before them; without such a token at least the end of another."""
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return [start, *tokenizer.encode(text)]


def _prompt_ids(engine: Engine, text: str) -> list[int]:
    """`beginning` of so much of the text's end as the engine can read."""
    return beginning(engine.tokenizer, text[-MOST_CHARS_PER_TOKEN * engine.context :])


def _score_choices(engine: Engine, questions: Sequence[Choice]) -> dict[str, float]:
    encode = engine.tokenizer.encode
    prompts = ((q, _prompt_ids(engine, q.prompt)) for q in questions)
    found = iter(likelihoods(engine, ((ids, encode(choice)) for q, ids in prompts for choice in q.choices)))
    right, by_byte = [], []
    for question in questions:
        nats = [next(found).log_likelihood for _ in question.choices]
        a_byte = [n / len(choice.encode()) for n, choice in zip(nats, question.choices, strict=True)]
        right.append(nats.index(max(nats)) == question.answer)
        by_byte.append(a_byte.index(max(a_byte)) == question.answer)
    return _share("accuracy", right) | {"accuracy_per_byte": sum(by_byte) / len(by_byte)}


def _score_clozes(engine: Engine, questions: Sequence[Cloze]) -> dict[str, float]:
    encode = engine.tokenizer.encode
    found = likelihoods(engine, ((_prompt_ids(engine, q.text), encode(q.gap)) for q in questions))
    nats, tokens = -sum(f.log_likelihood for f in found), sum(f.tokens for f in found)
    return _share("accuracy", [f.greedy for f in found]) | {"perplexity": math.exp(nats / tokens)}


def _score_programs(engine: Engine, questions: Sequence[Program], samples: int, seed: int) -> dict[str, float]:
    temperature = SAMPLING_TEMPERATURE if samples > 1 else 0.0
    asked = [question for question in questions for _ in range(samples)]
    requests = [_request(engine, q.prompt, q.stop, q.max_tokens, temperature, seed + i) for i, q in enumerate(asked)]
    written = [completion.text for completion in engine.complete(requests)]
    passed = [runs_without_fault(f"{q.prompt}{text}\n{q.test}\n") for q, text in zip(asked, written, strict=True)]
    right = [sum(passed[first : first + samples]) for first in range(0, len(passed), samples)]
    ks = sorted({1, samples, *(k for k in (10, 100) if k < samples)})
    means = {f"pass@{k}": sum(pass_at_k(samples, count, k) for count in right) / len(right) for k in ks}
    return means | {"questions": len(right)}


def _request(
    engine: Engine, prompt: str, stop: tuple[str, ...], max_tokens: int, temperature: float, seed: int
) -> Request:
    ids, room = fitting(engine, _prompt_ids(engine, prompt), max_tokens)
    return Request(ids, SamplingParams(temperature=temperature, max_tokens=room, stop=stop, seed=seed))


def fitting(engine: Engine, ids: list[int], max_tokens: int) -> tuple[list[int], int]:
    """(the prompt, tokens of an answer) for the model's context: the answer gets what the prompt leaves, a quarter of
    it at least; only where that is not there is the prompt's beginning cut off."""
    least = min(max_tokens, engine.context // 4)
    room = max(least, min(max_tokens, engine.context - len(ids)))
    return ids[-(engine.context - room) :], room


def _share(name: str, right: Sequence[bool]) -> dict[str, float]:
    share, count = sum(right) / len(right), len(right)
    return {name: share, "stderr": math.sqrt(share * (1 - share) / count), "questions": count}
