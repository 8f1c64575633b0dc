"""Failures of a long run: how often it breaks, how often to checkpoint, and what share of the time is productive.

`simulate_run` plays a run event by event (simpy) with a pool of spare nodes; `expected_goodput` is Daly's closed form
for the same run with spares without end, and the planner's link. A test holds one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from baleen.config import UserError
from baleen.cost.factors import factor_table, override_factors


@dataclass(frozen=True)
class Reliability:
    """What breaks and what that costs. Units in the names; defaults and sources in data/reliability.toml."""

    failures_per_gpu_hour: float
    checkpoint_seconds: float  # training stands still
    restart_seconds: float  # failure to first new step, a node being free
    gpus_per_node: int
    spare_share: float  # spare nodes per node of the job
    repair_hours: float

    def __post_init__(self) -> None:
        if self.failures_per_gpu_hour <= 0 or self.checkpoint_seconds <= 0:
            raise UserError("failures_per_gpu_hour and checkpoint_seconds must be above 0")
        if self.restart_seconds < 0 or self.spare_share < 0 or self.repair_hours < 0 or self.gpus_per_node < 1:
            raise UserError(
                "restart_seconds, spare_share and repair_hours must not be negative, gpus_per_node at least 1"
            )

    def mtbf_seconds(self, gpus: int) -> float:
        """Mean time between failures of a job on `gpus` GPUs that fail independently."""
        if gpus < 1:
            raise UserError(f"a job on {gpus} GPUs does not exist: give at least 1")
        return 3600 / (self.failures_per_gpu_hour * gpus)


def load_reliability(overrides: Iterable[str] = ()) -> Reliability:
    """The factors of data/reliability.toml; each override is `name=number`. Raises UserError on an unknown name."""
    factors = override_factors(factor_table("reliability"), overrides)
    values = {name: factor.value for name, factor in factors.items()}
    return Reliability(**{**values, "gpus_per_node": int(values["gpus_per_node"])})


def young_daly_seconds(checkpoint_seconds: float, mtbf_seconds: float) -> float:
    """Best time between checkpoints, to first order: sqrt(2 C M) (Young 1974, Daly 2006)."""
    return math.sqrt(2 * checkpoint_seconds * mtbf_seconds)


def expected_goodput(gpus: int, reliability: Reliability, interval_seconds: float | None = None) -> float:
    """Productive share of the time (Daly 2006, Eq. 20): failures are memoryless and strike restarts too.

    interval_seconds: work between checkpoints; None takes Young and Daly's.
    """
    mtbf = reliability.mtbf_seconds(gpus)
    interval = interval_seconds or young_daly_seconds(reliability.checkpoint_seconds, mtbf)
    segment = (interval + reliability.checkpoint_seconds) / mtbf
    # Beyond e^700 the wall time overflows: the run never finishes.
    if segment + reliability.restart_seconds / mtbf > 700:
        return 0.0
    return interval / (mtbf * math.exp(reliability.restart_seconds / mtbf) * math.expm1(segment))


MOST_STRETCHES = 1_000_000  # between checkpoints, played in one simulation: about ten seconds


@dataclass(frozen=True)
class RunOutcome:
    """Where the wall time of a simulated run went, in seconds."""

    work: float
    checkpoints: float
    lost: float  # work and checkpoints undone by a failure
    restarts: float
    waiting: float  # for a spare node
    failures: int

    @property
    def wall(self) -> float:
        return self.work + self.checkpoints + self.lost + self.restarts + self.waiting

    @property
    def goodput(self) -> float:
        return self.work / self.wall


def simulate_run(
    gpus: int, work_seconds: float, reliability: Reliability, *, interval_seconds: float | None = None, seed: int = 0
) -> RunOutcome:
    """Plays one run of `work_seconds` of productive time: work, checkpoint, fail, wait for a spare, restart, go on.

    Failures are memoryless, so the time to the next one is drawn anew for every stretch. A failed node returns to the
    spares after its repair. Raises UserError if a failure comes so often that no stretch can be finished.
    """
    import simpy

    if work_seconds <= 0:
        raise UserError(f"a run of {work_seconds} s of work does not exist: give more than 0")
    mtbf = reliability.mtbf_seconds(gpus)
    interval = interval_seconds or young_daly_seconds(reliability.checkpoint_seconds, mtbf)
    if expected_goodput(gpus, reliability, interval) < 1e-3:
        raise UserError(
            f"{gpus} GPUs fail every {mtbf:.0f} s on average, before {interval:.0f} s of work and a checkpoint: "
            "checkpoint or restart faster, or take fewer GPUs"
        )
    env = simpy.Environment()
    rng = np.random.default_rng(seed)
    spares = math.ceil(reliability.spare_share * gpus / reliability.gpus_per_node)
    pool = simpy.Container(env, init=spares)
    spent = {"work": 0.0, "checkpoints": 0.0, "lost": 0.0, "restarts": 0.0, "waiting": 0.0}
    failures = 0

    def survive(seconds: float) -> Generator[Any, Any, float]:
        """Lives through a stretch or until it fails; returns the seconds it got."""
        lived = min(seconds, float(rng.exponential(mtbf)))
        yield env.timeout(lived)
        return lived

    def repair() -> Generator[Any, Any, None]:
        yield env.timeout(reliability.repair_hours * 3600)
        yield pool.put(1)

    def recover() -> Generator[Any, Any, None]:
        nonlocal failures
        while True:
            failures += 1
            env.process(repair())
            asked = env.now
            yield pool.get(1)
            spent["waiting"] += env.now - asked
            lived = yield from survive(reliability.restart_seconds)
            spent["restarts"] += lived
            if lived == reliability.restart_seconds:
                return

    def run() -> Generator[Any, Any, None]:
        while spent["work"] < work_seconds:
            segment = min(interval, work_seconds - spent["work"])
            stretch = segment + reliability.checkpoint_seconds
            lived = yield from survive(stretch)
            if lived == stretch:
                spent["work"] += segment
                spent["checkpoints"] += reliability.checkpoint_seconds
            else:
                spent["lost"] += lived
                yield from recover()

    env.run(until=env.process(run()))
    return RunOutcome(**spent, failures=failures)


def failures_report(
    gpus: int, days: float, overrides: Iterable[str] = (), *, interval_seconds: float | None = None, seed: int = 0
) -> dict[str, Any]:
    """A run of `days` productive days, simulated and expected: what `baleen cost simulate failures` prints."""
    if not days > 0 or not math.isfinite(days):
        raise UserError(f"--days {days}: give a number above 0")
    if interval_seconds is not None and not 0 < interval_seconds < math.inf:
        raise UserError(f"--interval {interval_seconds:g}: give seconds above 0")
    reliability = load_reliability(overrides)
    mtbf = reliability.mtbf_seconds(gpus)
    best = young_daly_seconds(reliability.checkpoint_seconds, mtbf)
    stretches = days * 86400 / (interval_seconds or best)
    if stretches > MOST_STRETCHES:
        raise UserError(
            f"{days:g} days in stretches of {interval_seconds or best:.3g} s are {stretches:.2g} events: take at most "
            f"{days * MOST_STRETCHES / stretches:.3g} days or a longer --interval"
        )
    outcome = simulate_run(gpus, days * 86400, reliability, interval_seconds=interval_seconds, seed=seed)
    return {
        "gpus": gpus,
        "mtbf_hours": mtbf / 3600,
        "checkpoint_interval_seconds": interval_seconds or best,
        "young_daly_seconds": best,
        "failures": outcome.failures,
        "goodput": outcome.goodput,
        "expected_goodput": expected_goodput(gpus, reliability, interval_seconds),
        "days": {
            name: getattr(outcome, name) / 86400
            for name in ("wall", "work", "checkpoints", "lost", "restarts", "waiting")
        },
        "factors": {
            name: vars(factor) for name, factor in override_factors(factor_table("reliability"), overrides).items()
        },
    }
