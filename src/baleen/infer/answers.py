"""What a reasoning model's text says in the end, and what several of them agree on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


def answer_of(completion: str) -> str | None:
    """What stands in the one <answer>, or without one all behind the thought; None if the thought never ended.

    Two answers are none: else a model could guess many and be paid for the best.
    """
    said = completion.rpartition("</think>")[2]
    if "<think>" in said:
        return None
    answers = re.findall(r"<answer>(.*?)</answer>", said, re.DOTALL)
    if len(answers) == 1:
        return answers[0].strip()
    return None if "<answer>" in said else said.strip()


class Vote(NamedTuple):
    index: int  # of the first completion with the winning answer
    votes: int
    cast: int  # completions that had an answer at all


def majority(completions: Sequence[str]) -> Vote | None:
    """The commonest answer (self-consistency, arXiv 2203.11171); of equally common ones the first. None without any."""
    said = [answer_of(text) for text in completions]
    counted = Counter(text for text in said if text)
    if not counted:
        return None
    winner, votes = counted.most_common(1)[0]
    return Vote(said.index(winner), votes, counted.total())
