"""How often a model is right on held-out questions, and how sure one can be of that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from baleen.align.judge import Judge
from baleen.align.recipe import RewardConfig, SamplingConfig
from baleen.align.rollout import ACCURACY, Group, sample, score, that_fit
from baleen.align.stage import Work
from baleen.align.tasks import Question, Task, distinct_questions
from baleen.config import UserError
from baleen.data.tokenizer import Tokenizer
from baleen.infer.answers import majority
from baleen.model.transformer import Transformer

Z_95 = 1.959963984540054
HELDOUT_SEED = 0  # of the held-out questions, the same in every run of a recipe


class Share(NamedTuple):
    """A share with its 95 % interval by Wilson."""

    value: float
    low: float
    high: float


def wilson(right: float, count: int) -> Share:
    """Of `right` in `count` independent trials. Wilson, J. Am. Stat. Assoc. 22 (1927)."""
    if not count:
        return Share(math.nan, 0.0, 1.0)
    p, z2 = right / count, Z_95**2
    middle = (p + z2 / (2 * count)) / (1 + z2 / count)
    reach = Z_95 / (1 + z2 / count) * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2))
    return Share(p, max(0.0, middle - reach), min(1.0, middle + reach))


def heldout_questions(work: Work, tasks: Sequence[Task], count: int, *, or_fewer: bool = False) -> list[Question]:
    """The ones that curves are measured on, but for those that are too long for the model.

    Raises UserError if the tasks have fewer than `count` (unless or_fewer), or if all are too long.
    """
    asked = distinct_questions(tasks, "test", HELDOUT_SEED, count, or_fewer=or_fewer)
    fit = list(that_fit(work.model, work.tokenizer, asked, work.recipe.system))
    if not fit:
        raise UserError(f"held-out questions such as {asked[0].prompt[:60]!r} fill the model's context")
    return fit


def greedy_accuracy(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    judge: Judge,
    max_tokens: int,
    system: str = "",
) -> float:
    """Share of the questions whose likeliest answer is right."""
    sampling = SamplingConfig(max_tokens=max_tokens)
    groups = sample(model, tokenizer, questions, 1, sampling, seed=0, system=system, greedy=True)
    return mean_correct([score(judge, [RewardConfig(name=ACCURACY)], group) for group in groups])


def drawn_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    judge: Judge,
    sampling: SamplingConfig,
    *,
    samples: int,
    seed: int,
    system: str = "",
) -> list[Group]:
    """`samples` answers to each question, scored."""
    drawn = sample(model, tokenizer, questions, samples, sampling, seed=seed, system=system)
    return [score(judge, [RewardConfig(name=ACCURACY)], group) for group in drawn]


def measure(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    judge: Judge,
    sampling: SamplingConfig,
    *,
    samples: int,
    seed: int,
    system: str = "",
) -> dict[str, Any]:
    """{greedy, sampled, votes, answer_tokens, ...}: shares with intervals of greedy answers, of the mean of `samples`
    drawn ones, and of the majority of the first k of them, for each k; the mean length of a drawn answer.

    Samples of one question hang together, so the interval of their mean counts questions, not samples.
    """
    greedy = greedy_accuracy(model, tokenizer, questions, judge, sampling.max_tokens, system)
    drawn = drawn_answers(model, tokenizer, questions, judge, sampling, samples=samples, seed=seed, system=system)
    count = len(questions)
    return {
        "questions": count,
        "greedy": wilson(greedy * count, count)._asdict(),
        "sampled": wilson(mean_correct(drawn) * count, count)._asdict(),
        "samples": samples,
        "answer_tokens": sum(len(answer.token_ids) for group in drawn for answer in group.answers) / (count * samples),
        "votes": {str(k): wilson(sum(vote_is_right(g, k) for g in drawn), count)._asdict() for k in _ks(samples)},
    }


def mean_correct(groups: Sequence[Group]) -> float:
    scores = [score.correct for group in groups for score in group.scores]
    return sum(scores) / len(scores)


def vote_is_right(group: Group, k: int) -> bool:
    """Whether the commonest of the first k answers is right; of equally common ones the first counts."""
    vote = majority([answer.text for answer in group.answers[:k]])
    return vote is not None and group.scores[vote.index].correct >= 1.0


def _ks(samples: int) -> list[int]:
    """1, 2, 4, ... and `samples` itself."""
    return sorted({*(2**i for i in range(samples.bit_length()) if 2**i <= samples), samples})
