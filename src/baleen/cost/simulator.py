"""Executes a pipeline schedule operation by operation: the timeline, the bubbles and what each rank keeps.

The rules are those of training itself and nothing else: a rank runs its operations one after another in its order;
F needs the stage before, a backward needs its own F and the backward of the stage after, W needs its I; what crosses
from one rank to another arrives `latency` later. There is no formula here: bubbles are what is left of the timeline.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from baleen.config import UserError
from baleen.cost.schedule import Action, Op, Order

PerStage = float | Sequence[float]
Key = tuple[str, int, int]  # an Op, or a tuple equal to one: kind, stage, micro-batch


# What a micro-batch does in a stage: a whole backward, or one in two parts.
COMPLETE = ({"F", "B"}, {"F", "I", "W"})


class ImpossibleOrder(UserError):
    """An order of operations that cannot be executed: an operation missing, doubled or waiting for ever."""


@dataclass(frozen=True)
class Durations:
    """Seconds of the operations of one micro-batch in one stage, for all stages alike or one value a stage."""

    forward: PerStage
    backward: PerStage  # full: inputs and weights together
    weight: PerStage  # the part of `backward` that is for the weights
    overlap: float = 1.0  # a forward and a backward run as a pair take this share of their sum
    latency: float = 0.0  # from the end of an operation to its arrival on another rank; occupies neither

    def __post_init__(self) -> None:
        for name in ("forward", "backward", "weight"):
            value = getattr(self, name)
            if not all(0 <= v < math.inf for v in (value if isinstance(value, Sequence) else [value])):
                raise UserError(f"the {name} time of a stage is {value}: give seconds, 0 or more")
        stages = max((len(v) for v in (self.backward, self.weight) if isinstance(v, Sequence)), default=1)
        if any(_at(self.weight, stage) > _at(self.backward, stage) for stage in range(stages)):
            raise UserError(
                f"the weight gradient ({self.weight}) is longer than the backward it is part of ({self.backward})"
            )
        if not 0 < self.overlap <= 1 or not 0 <= self.latency < math.inf:
            raise UserError(f"overlap {self.overlap} must be in (0, 1] and latency {self.latency} 0 or more")

    def of(self, kind: str, stage: int) -> float:
        """Seconds of one operation that runs by itself."""
        match kind:
            case "F":
                return _at(self.forward, stage)
            case "B":
                return _at(self.backward, stage)
            case "W":
                return _at(self.weight, stage)
        return _at(self.backward, stage) - _at(self.weight, stage)


class Span(NamedTuple):
    """One action on the timeline, in seconds from the start of the step."""

    action: Action
    start: float
    end: float

    @property
    def kind(self) -> str:
        """F, B, I, W, or F&B for an overlapped pair."""
        kinds = [op.kind for op in self.action]
        return "F&B" if len(kinds) > 1 else kinds[0]


@dataclass(frozen=True)
class Timeline:
    """What happened when: spans[rank] in order of time."""

    spans: list[list[Span]]

    @cached_property
    def seconds(self) -> float:
        return max(span.end for rank in self.spans for span in rank)

    @cached_property
    def busy_seconds(self) -> list[float]:
        return [sum(span.end - span.start for span in rank) for rank in self.spans]

    @cached_property
    def bubble_seconds(self) -> list[float]:
        """Per rank: the length of the step less the time the rank was at work."""
        return [self.seconds - busy for busy in self.busy_seconds]

    @cached_property
    def peak_activations(self) -> list[int]:
        """Per rank: most micro-batch activations alive at once, each from the start of its F to the end of its B or W.

        One unit is what one stage keeps of one micro-batch.
        """
        peaks = []
        for rank in self.spans:
            live = peak = 0
            for span in rank:
                live += sum(op.kind == "F" for op in span.action)
                peak = max(peak, live)
                live -= sum(op.kind in "BW" for op in span.action)
            peaks.append(peak)
        return peaks

    @cached_property
    def stages_held(self) -> list[int]:
        """Per rank: stages whose parameters it holds."""
        return [len({op.stage for span in rank for op in span.action}) for rank in self.spans]

    def seconds_by_kind(self, rank: int) -> dict[str, float]:
        """Seconds a rank spends in F, B, I, W and F&B (overlapped pairs), and in the bubble."""
        kinds: defaultdict[str, float] = defaultdict(float)
        for span in self.spans[rank]:
            kinds[span.kind] += span.end - span.start
        return {**kinds, "bubble": self.bubble_seconds[rank]}


def execute(order: Order, durations: Durations) -> Timeline:
    """Runs every rank's order as early as its dependencies allow.

    Raises ImpossibleOrder (a UserError) if an operation is missing or doubled, or if the ranks wait for each other.
    """
    rank_of = _ranks(order)
    last_stage = max(stage for _, stage, _ in rank_of)
    seconds = {place: durations.of(*place) for place in {(kind, stage) for kind, stage, _ in rank_of}}
    finished: dict[Key, float] = {}
    spans: list[list[Span]] = [[] for _ in order]
    waiting: dict[Key, list[int]] = {}  # operation -> ranks whose next action needs it
    ready = list(range(len(order)))
    while ready:
        rank = ready.pop()
        done = spans[rank]
        now = done[-1].end if done else 0.0
        for action in order[rank][len(done) :]:
            missing = None
            for op in action:
                for need in _needs(op, rank_of, last_stage):
                    end = finished.get(need)
                    if end is None:
                        missing = need
                        break
                    now = max(now, end if rank_of[need] == rank else end + durations.latency)
                if missing:
                    break
            if missing:
                waiting.setdefault(missing, []).append(rank)
                break
            length = sum([seconds[op[:2]] for op in action])
            start, now = now, now + (length * durations.overlap if len(action) > 1 else length)
            done.append(Span(action, start, now))
            for op in action:
                finished[op] = now
                if op in waiting:
                    ready += waiting.pop(op)
    if waiting:
        stuck = "; ".join(
            f"rank {rank} waits for {_name(need)} before {' & '.join(map(str, order[rank][len(spans[rank])]))}"
            for need, ranks in sorted(waiting.items())
            for rank in ranks
        )
        raise ImpossibleOrder(f"the schedule deadlocks: {stuck}; put what is waited for earlier in its rank's order")
    return Timeline(spans)


def _name(key: Key) -> str:
    kind, stage, m = key
    return f"{kind}{m} of stage {stage}"


def _needs(op: Op, rank_of: dict[Key, int], last_stage: int) -> tuple[Key, ...]:
    kind, stage, m = op
    if kind == "F":
        return (("F", stage - 1, m),) if stage else ()
    if kind == "W":
        return (("I", stage, m),)
    if stage == last_stage:
        return (("F", stage, m),)
    full = ("B", stage + 1, m)
    return ("F", stage, m), full if full in rank_of else ("I", stage + 1, m)


def _ranks(order: Order) -> dict[Key, int]:
    """Which rank runs each operation; each micro-batch must pass each stage once, forward and backward, on one rank."""
    rank_of: dict[Key, int] = {}
    for rank, actions in enumerate(order):
        for action in actions:
            if len(action) > 1 and sorted(op.kind for op in action) not in (["B", "F"], ["F", "I"]):
                raise ImpossibleOrder(
                    f"rank {rank} overlaps {' & '.join(map(str, action))}: only an F and a B may pair"
                )
            for op in action:
                if op in rank_of:
                    raise ImpossibleOrder(f"{op} runs twice, on ranks {rank_of[op]} and {rank}: remove one of them")
                rank_of[op] = rank
    if not rank_of:
        raise ImpossibleOrder("the order holds no operation: give at least one F and one B")
    kinds: dict[tuple[int, int], dict[str, int]] = {}
    for (kind, stage, m), rank in rank_of.items():
        kinds.setdefault((stage, m), {})[kind] = rank
    stages = range(1 + max(stage for stage, _ in kinds))
    for m in {m for _, m in kinds}:
        for stage in stages:
            have = kinds.get((stage, m), {})
            if have.keys() not in COMPLETE:
                raise ImpossibleOrder(
                    f"micro-batch {m} has {'+'.join(sorted(have)) or 'nothing'} in stage {stage}: "
                    "it needs F and B, or F, I and W"
                )
            if len(set(have.values())) > 1:
                raise ImpossibleOrder(f"micro-batch {m} changes ranks within stage {stage}: keep its operations on one")
    return rank_of


def _at(value: PerStage, stage: int) -> float:
    return value[stage] if isinstance(value, Sequence) else value
