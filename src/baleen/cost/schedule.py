"""Pipeline schedules as data: for each rank the order in which it runs its operations.

A schedule says only *what* a rank does and in which order. How long that takes, where it waits and what it keeps is
found by executing the order (`baleen.cost.simulator`), so nothing here or there knows a bubble formula.

Operations follow PyTorch's names: F forward, B full backward, I backward for the inputs, W backward for the weights.
The papers' B is the full backward, I + W together.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Literal, NamedTuple

from baleen.config import UserError

Kind = Literal["F", "B", "I", "W"]


class Op(NamedTuple):
    """One operation on one micro-batch in one stage of the model (stage 0 holds the embedding)."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch} of stage {self.stage}"


Action = tuple[Op, ...]  # one operation, or a forward and a backward that overlap
Order = list[list[Action]]  # [rank][position]


def gpipe(ranks: int, microbatches: int) -> Order:
    """All forwards, then all backwards (arXiv 1811.06965)."""
    check_counts("gpipe", ranks, microbatches)
    return [
        [(Op(kind, rank, m),) for kind in ("F", "B") for m in range(microbatches)] for rank in range(ranks)
    ]  # fmt: skip


def one_f_one_b(ranks: int, microbatches: int) -> Order:
    """1F1B (arXiv 2006.09503): a rank runs ahead by its distance from the end, then alternates."""
    check_counts("1f1b", ranks, microbatches)
    order: Order = []
    for rank in range(ranks):
        ops = [op for turn in _alternate(rank, ranks, microbatches, "B") for op in turn]
        order.append([(op,) for op in ops])
    return order


def _alternate(rank: int, ranks: int, microbatches: int, backward: Kind) -> Iterator[list[Op]]:
    """What 1F1B runs between one micro-batch's backward and the next: forwards that are due, then that backward."""
    due = iter(Op("F", rank, m) for m in range(microbatches))
    ahead = min(ranks - 1 - rank, microbatches)
    for m in range(microbatches):
        yield [*islice(due, 1 if m else ahead + 1), Op(backward, rank, m)]


def interleaved_1f1b(ranks: int, microbatches: int, stages_per_rank: int = 2) -> Order:
    """Interleaved 1F1B (arXiv 2104.04473): a rank holds stages rank, rank + R, ...; micro-batches go in rounds of R."""
    check_counts("interleaved", ranks, microbatches)
    if stages_per_rank < 1:
        raise UserError(f"a rank cannot hold {stages_per_rank} stages: take at least 1")

    def chunks(rank: int, reverse: bool) -> Iterator[tuple[int, int]]:
        """(stage, micro-batch) in the order in which a rank meets them: R micro-batches through each of its stages."""
        turns = range(stages_per_rank)
        for first in range(0, microbatches, ranks):
            for turn in reversed(turns) if reverse else turns:
                for m in range(first, first + ranks):
                    yield turn * ranks + rank, m

    order: Order = []
    total = microbatches * stages_per_rank
    for rank in range(ranks):
        forwards = [Op("F", stage, m) for stage, m in chunks(rank, reverse=False)]
        backwards = [Op("B", stage, m) for stage, m in chunks(rank, reverse=True)]
        # With one stage a rank this is plain 1F1B; with more, a backward travels twice as far before it returns.
        distance = ranks - 1 - rank
        ahead = distance if stages_per_rank == 1 else min(total, 2 * distance + (stages_per_rank - 1) * ranks)
        ops = forwards[:ahead]
        for k, backward in enumerate(backwards):
            ops += forwards[ahead + k : ahead + k + 1]
            ops.append(backward)
        order.append([(op,) for op in ops])
    return order


def zb1p(ranks: int, microbatches: int) -> Order:
    """ZB1P, the ZB-H1 of arXiv 2401.10241: rank r puts off its weight gradients by r micro-batches.

    They fill the end of the pipeline, and no rank ever keeps more than 1F1B's first rank does.
    """
    check_counts("zb1p", ranks, microbatches)
    order: Order = []
    for rank in range(ranks):
        ops: list[Op] = []
        for m, turn in enumerate(_alternate(rank, ranks, microbatches, "I")):
            ops += [*turn, *([Op("W", rank, m - rank)] if m >= rank else [])]
        ops += [Op("W", rank, m) for m in range(max(0, microbatches - rank), microbatches)]
        order.append([(op,) for op in ops])
    return order


def dualpipe(ranks: int, microbatches: int) -> Order:
    """DualPipe (arXiv 2412.19437 §3.2.1): micro-batches enter at both ends; a rank holds a stage of each direction."""
    check_counts("dualpipe", ranks, microbatches)
    half = microbatches // 2
    order: Order = []
    for rank in range(ranks):
        # Direction 0 is the one that enters at the nearer end, so both halves of the pipe read the same programme.
        near, mirror = min(rank, ranks - 1 - rank), rank >= ranks // 2
        first = half if mirror else 0  # the later micro-batches enter at the last rank
        order.append(
            _bidirectional(
                depth=ranks // 2,
                position=near,
                microbatches=half,
                stages=(near, ranks - 1 - near),
                first_microbatch=(first, half - first),
            )
        )
    return order


def dualpipe_v(ranks: int, microbatches: int) -> Order:
    """DualPipeV (the "cut-in-half" of DualPipe): one direction, and the second half of the stages folds back.

    Rank r holds stages r and 2R - 1 - r; R ranks are a pipeline of 2R stages.
    """
    check_counts("dualpipev", ranks, microbatches)
    return [
        _bidirectional(
            depth=ranks,
            position=rank,
            microbatches=microbatches,
            stages=(rank, 2 * ranks - 1 - rank),
            first_microbatch=(0, 0),
        )
        for rank in range(ranks)
    ]


def _bidirectional(
    depth: int, position: int, microbatches: int, stages: tuple[int, int], first_microbatch: tuple[int, int]
) -> list[Action]:
    """The eight phases of DualPipe for the rank at `position` of `depth` on the way from an end to the middle.

    Each direction d carries `microbatches` numbered from first_microbatch[d], through stage stages[d] of this rank.
    Phases as published with github.com/deepseek-ai/DualPipe; 0 and 1 are the directions, "F0B1" overlaps.
    """
    counts: dict[tuple[str, int], int] = defaultdict(int)
    owed: deque[Op] = deque()  # weight gradients put off

    def op(kind: Kind, direction: int) -> Op:
        group = "F" if kind == "F" else "B"
        m = first_microbatch[direction] + counts[group, direction]
        counts[group, direction] += 1
        if kind == "I":
            owed.append(Op("W", stages[direction], m))
        return Op(kind, stages[direction], m)

    from_middle = depth - 1 - position
    steady = microbatches - 2 * depth + position + 1
    actions: list[Action] = []

    for _ in range(2 * from_middle):  # 1: fill from the near end
        actions.append((op("F", 0),))
    for _ in range(position + 1):  # 2: forwards of both directions
        actions += [(op("F", 0),), (op("F", 1),)]
    for _ in range(from_middle):  # 3: the far direction turns round first; its weight gradient fills the wait
        actions += [(op("I", 1),), (owed.popleft(),), (op("F", 1),)]
    for turn in range(steady):  # 4: overlapped pairs
        pair = (op("F", 0), op("B", 1))
        # The middle ranks feed each other: run apart, the forward is handed on sooner.
        actions += [(pair[0],), (pair[1],)] if turn == 0 and from_middle == 0 else [pair]
        actions.append((op("F", 1), op("B", 0)))
    for _ in range(from_middle):  # 5: the near direction has run out of forwards
        actions += [(op("B", 1),), (op("F", 1), op("B", 0))]
    for turn in range(2 * (position + 1)):  # 6: backwards of both; the later half splits off its weight gradients
        kind: Kind = "B" if turn < position + 1 else "I"
        actions.append((op(kind, 1 - turn % 2),))
    for _ in range(from_middle):  # 7: the last input gradients, with weight gradients in the gaps
        actions += [(owed.popleft(),), (op("I", 0),)]
    actions += [(weight,) for weight in owed]  # 8
    return actions


SCHEDULES: dict[str, Callable[[int, int], Order]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved_1f1b,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipe_v,
}


def schedule(name: str, ranks: int, microbatches: int) -> Order:
    """The order of a schedule by name. Raises UserError for an unknown name or counts it cannot run."""
    if name.lower() not in SCHEDULES:
        raise UserError(f"no pipeline schedule {name!r}: take one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name.lower()](ranks, microbatches)


def check_counts(name: str, ranks: int, microbatches: int) -> None:
    """Raises UserError, naming the nearest numbers that work, if a schedule cannot run these counts."""
    if ranks < 1 or microbatches < 1:
        raise UserError(
            f"{ranks} pipeline ranks with {microbatches} micro-batches do not exist: take at least 1 of each"
        )
    if name == "interleaved" and microbatches % ranks:
        low = microbatches - microbatches % ranks
        near = f"{low} or {low + ranks}" if low else str(ranks)
        raise UserError(
            f"interleaved 1F1B moves micro-batches in rounds of {ranks} ranks: take {near} micro-batches instead of "
            f"{microbatches}"
        )
    if name == "dualpipe" and ranks % 2:
        raise UserError(f"DualPipe folds its ranks in two: take {max(2, ranks - 1)} or {ranks + 1} instead of {ranks}")
    if name in ("dualpipe", "dualpipev") and microbatches < 2 * ranks:
        raise UserError(f"{microbatches} micro-batches do not fill {ranks} ranks of {name}: take at least {2 * ranks}")
    if name == "dualpipe" and microbatches % 2:
        raise UserError(
            f"DualPipe sends half of its micro-batches each way: take {microbatches - 1} or {microbatches + 1} "
            f"instead of {microbatches}"
        )
