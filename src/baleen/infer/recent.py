"""What of a long conversation its prompt still holds: the newest turns."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol, TypeVar


class Spoken(Protocol):
    @property
    def role(self) -> str: ...


M = TypeVar("M", bound=Spoken)


def recent(messages: Sequence[M], encode: Callable[[list[M]], list[int]], room: int) -> tuple[list[int], int]:
    """The prompt of the newest turns that take no more than `room` tokens, and how many messages it leaves out.

    Turns go from the oldest on, each with its answer. The system messages at the head stay, and so does the last turn,
    whatever it takes. `encode` is called some log2 of the turns times: the fewer turns, the shorter the prompt.
    """
    head = next((i for i, message in enumerate(messages) if message.role not in ("system", "developer")), len(messages))
    cuts = [i for i in range(head + 1, len(messages)) if messages[i].role == "user"]

    @cache
    def prompt(cut: int) -> list[int]:
        return encode([*messages[:head], *messages[cut:]])

    cut = head
    if cuts and len(prompt(head)) > room:
        cut = cuts[bisect_left(cuts[:-1], True, key=lambda cut: len(prompt(cut)) <= room)]
    return prompt(cut), cut - head
