"""Answers to questions: drawn by the chat's engine, G a question, and scored by the judge."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from baleen.align.judge import Judge
from baleen.align.recipe import RewardConfig, SamplingConfig
from baleen.align.tasks import Question
from baleen.config import UserError
from baleen.data.document import Message
from baleen.data.tokenizer import Tokenizer
from baleen.infer.engine import Engine, Logprob, Request
from baleen.infer.parse import THINK, opens_reasoning
from baleen.infer.sampler import SamplingParams
from baleen.model.transformer import Transformer

ACCURACY = "accuracy"
ALIKE = 1e-6  # rewards of a group that differ by no more teach nothing
PATIENCE = 1000  # questions in a row that are too long before a task counts as too long for the model


@dataclass(frozen=True)
class Answer:
    """One completion: its tokens, the end token included, and their log-probabilities as the engine drew them."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of the model's own distribution, at temperature 1
    text: str
    truncated: bool


@dataclass(frozen=True)
class Score:
    """`rewards` by name, unweighted; `total` is their weighted sum, `correct` the task's own verdict."""

    rewards: Mapping[str, float]
    total: float
    correct: float


@dataclass(frozen=True)
class Group:
    """A question, its G answers and, once judged, their scores."""

    question: Question
    answers: tuple[Answer, ...]
    scores: tuple[Score, ...] = ()

    @property
    def has_variance(self) -> bool:
        """Whether some answers earned more than others: only then is there anything to learn (with any scaling)."""
        totals = [score.total for score in self.scores]
        return max(totals) - min(totals) > ALIKE


def prompt_of(tokenizer: Tokenizer, question: Question, system: str) -> list[int]:
    """The question as the chat asks it, up to where the assistant speaks."""
    messages = [Message("system", system)] if system else []
    return tokenizer.encode_chat([*messages, Message("user", question.prompt)], add_generation_prompt=True)


def that_fit(
    model: Transformer, tokenizer: Tokenizer, questions: Iterable[Question], system: str
) -> Iterator[Question]:
    """Those that leave room for an answer. Raises UserError if the context is too short for all of very many."""
    context, too_long = model.config.max_position_embeddings, 0
    for question in questions:
        if len(prompt_of(tokenizer, question, system)) < context:
            too_long = 0
            yield question
        elif (too_long := too_long + 1) == PATIENCE:
            raise UserError(f"questions such as {question.prompt[:60]!r} fill the model's context of {context} tokens")


def sample(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    count: int,
    sampling: SamplingConfig,
    *,
    seed: int,
    system: str = "",
    greedy: bool = False,
    first: int = 0,
) -> list[Group]:
    """`count` answers to each question, in one continuous batch; the same for the same seed, whatever the batch.

    first: the number of the first of these questions, where they are some of more. A text begins with what of a
    thought the template has opened. A new engine each time: pages and packed weights of the last one are of weights
    that have since been trained.
    """
    prompts = [prompt_of(tokenizer, question, system) for question in questions]
    end = (tokenizer.eos_id,) if tokenizer.turn_end_id is None else (tokenizer.eos_id, tokenizer.turn_end_id)
    opened = [f"{THINK}\n" if opens_reasoning(tokenizer, prompt) else "" for prompt in prompts]
    requests = [
        Request(
            prompt,
            SamplingParams(
                temperature=0.0 if greedy else sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=seed * 2**20 + (first + number) * count + again,
                stop_ids=end,
                logprobs=0,
            ),
        )
        for number, prompt in enumerate(prompts)
        for again in range(count)
    ]
    drawn = draw(model, requests)
    answers = [
        Answer(
            tuple(request.prompt_ids),
            tuple(known.token_id for known in logprobs),
            tuple(known.logprob for known in logprobs),
            opened[number // count]
            + tokenizer.decode([known.token_id for known in (logprobs if truncated else logprobs[:-1])]),
            truncated,
        )
        for number, (request, (logprobs, truncated)) in enumerate(zip(requests, drawn, strict=True))
    ]
    return [Group(q, tuple(answers[i * count : (i + 1) * count])) for i, q in enumerate(questions)]


def draw(model: Transformer, requests: Sequence[Request]) -> list[tuple[list[Logprob], bool]]:
    """For each request its tokens, the end token included, and whether they were cut off by length.

    By ids alone, and read once they are whole: of small models the text of every single token would be half the time.
    """
    # Small pages, for a page that the answers to a question share is read once, and the rest by each of them.
    engine = Engine(model, None, max_batch=len(requests), page_size=8)
    numbers = {engine.submit(request): number for number, request in enumerate(requests)}
    logprobs: list[list[Logprob]] = [[] for _ in requests]
    truncated = [False] * len(requests)
    with collections_paused():
        while engine.has_work:
            for event in engine.step():
                number = numbers[event.request]
                logprobs[number] += event.logprobs or ()
                truncated[number] = event.finish_reason == "length"
    return list(zip(logprobs, truncated, strict=True))


@contextlib.contextmanager
def collections_paused() -> Iterator[None]:
    """No garbage collection meanwhile: thousands of tuples a step bring on so many that they take a seventh of it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def score(judge: Judge, rewards: Sequence[RewardConfig], group: Group) -> Group:
    """The group with each answer's rewards. A verdict that fails is worth 0; the judge counts it. An answer that was
    cut off is not right, whatever it had said by then."""

    def scored(answer: Answer) -> Score:
        def ask(name: str) -> float:
            if name == ACCURACY and answer.truncated:
                return 0.0
            spec = group.question.verifier if name == ACCURACY else name
            return judge.score(spec, group.question.prompt, answer.text, group.question.answer).value

        values = {reward.name: ask(reward.name) for reward in rewards}
        total = sum(reward.weight * values[reward.name] for reward in rewards)
        correct = values[ACCURACY] if ACCURACY in values else ask(ACCURACY)
        return Score(values, total, correct)

    return Group(group.question, group.answers, tuple(scored(answer) for answer in group.answers))


def punish_overlong(group: Group, max_tokens: int, buffer: int) -> Group:
    """The group with less reward for its long answers: 0 less up to max_tokens - buffer tokens, from there on a line to
    1 less (DAPO's soft punishment, arXiv 2503.14476, eq. 13), and 1 less for whatever was cut off, by the context too.

    `buffer` in tokens; 0 punishes nothing.
    """
    if not buffer:
        return group

    def punished(answer: Answer, score: Score) -> Score:
        tokens = max_tokens if answer.truncated else len(answer.token_ids)
        overlong = -max(0, tokens - (max_tokens - buffer)) / buffer
        return replace(score, rewards={**score.rewards, "overlong": overlong}, total=score.total + overlong)

    return replace(group, scores=tuple(map(punished, group.answers, group.scores)))


def describe(groups: Sequence[Group]) -> dict[str, float]:
    """What a rollout was like: means over its answers."""
    answers = [answer for group in groups for answer in group.answers]
    scores = [score for group in groups for score in group.scores]
    names = scores[0].rewards
    return {
        "answers": len(answers),
        "reward": sum(s.total for s in scores) / len(scores),
        "accuracy": sum(s.correct for s in scores) / len(scores),
        **{f"reward_{name}": sum(s.rewards[name] for s in scores) / len(scores) for name in names},
        "answer_tokens": sum(len(a.token_ids) for a in answers) / len(answers),
        "truncated": sum(a.truncated for a in answers) / len(answers),
    }
