"""Sparse and dense over four sizes: a scaling fit, and at which size sparsity pays in time.

Shapes: S seeds, N sizes.
"""

from __future__ import annotations

import statistics

import numpy as np
from claim import UNSEEN, Notebook, interval, times

SIZES = ("sparse-128", "sparse", "sparse-256", "sparse-384")


def by_size(notebook: Notebook) -> dict[str, list[tuple[float, float]]]:
    """By arm: (active parameters, held-out bits per byte) of each size, means over the seeds."""
    arms = list(notebook.claims[SIZES[0]].arms)
    return {
        arm: [
            (
                statistics.mean(notebook.values(name, arm, "active_parameters")),
                statistics.mean(notebook.values(name, arm, "heldout_bpb")),
            )
            for name in SIZES
        ]
        for arm in arms
    }


def all_sizes(notebook: Notebook) -> bool:
    """Whether there are all rows of them."""
    return all(name in notebook.claims and notebook.complete(name) for name in SIZES)


def page_of_sizes(notebook: Notebook) -> list[str]:
    """A power law of each arm's losses, fitted seed by seed, and what it says of time."""
    lines = ["## Sparse and dense over four sizes", ""]
    if not all_sizes(notebook):
        return [*lines, f"Not all rows of {', '.join(SIZES)} are there yet.", ""]
    dense, sparse = notebook.claims[SIZES[0]].arms
    lines += [
        "log(bits per byte) = a + b log(active parameters), fitted to each seed alone; ± over the seeds, 95 %. All",
        "sizes have the same tokens, so this is no law of compute.", "",
        "| arm | exponent b | largest residual |", "|---|---:|---:|",
    ]  # fmt: skip
    losses_SN = {arm: _by_seed(notebook, arm, "heldout_bpb") for arm in (dense, sparse)}
    slopes: dict[str, list[float]] = {}
    for arm, losses in losses_SN.items():
        sizes = _by_seed(notebook, arm, "active_parameters")
        laws = [_law(of_seed, loss) for of_seed, loss in zip(sizes, losses, strict=True)]
        slopes[arm] = [law[0] for law in laws]
        pairs = zip(sizes, losses, laws, strict=True)
        residual = max(float(np.abs(loss / _at(law, size) - 1).max()) for size, loss, law in pairs)
        lines.append(f"| {arm} | {_plus_minus(slopes[arm])} | {residual:.2%} |")
    apart = [b - a for a, b in zip(slopes[dense], slopes[sparse], strict=True)]
    lines += [f"| sparse less dense | {_plus_minus(apart)} | |", ""]
    plot, timed = "![Losses by size](evidence/sizes.svg)", [notebook.run_seconds(name) for name in SIZES]
    if None in timed:
        return [*lines, "Not timed yet: `python evidence/times.py`.", "", plot, ""]
    seconds = {dense: np.array([statistics.median(of_size[dense]) for of_size in timed if of_size])}
    ratios = [times(of_size[dense], of_size[sparse])[0] for of_size in timed if of_size]
    seconds[sparse] = seconds[dense] * ratios
    laws = [_law(seconds[dense], loss) for loss in losses_SN[dense]]
    lines += [
        "In time: beside what a dense network that takes the sparse one's seconds would reach, by such a line through",
        "the losses and seconds of the dense ones, which for the largest is drawn on beyond its last point.", "",
        "| claim | difference at equal tokens | seconds | difference at equal seconds | pays in time |",
        "|---|---:|---:|---:|---|",
    ]  # fmt: skip
    pays: list[str] = []
    for i, name in enumerate(SIZES):
        in_time = [
            loss[i] / _at(law, seconds[sparse][i]) - 1 for loss, law in zip(losses_SN[sparse], laws, strict=True)
        ]
        (mean, half), (gap, gap_half) = interval(in_time), interval(notebook.gaps(name, sparse))
        pays.append("yes" if mean + half < 0 else "no" if mean - half > 0 else UNSEEN)
        lines.append(
            f"| {name} | {gap:+.2%} ± {gap_half:.2%} | {ratios[i]:.2f} × | {mean:+.2%} ± {half:.2%} | {pays[-1]} |"
        )
    paying = [name for name, word in zip(SIZES, pays, strict=True) if word == "yes"]
    said = f"in {', '.join(paying)}" if paying else "at none of the four sizes"
    return [*lines, "", f"On this machine sparsity is seen to pay in time {said}.", "", plot, ""]


def _by_seed(notebook: Notebook, arm: str, measure: str) -> np.ndarray:
    """[seeds, sizes]"""
    return np.array([notebook.values(name, arm, measure) for name in SIZES]).T


def _law(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(b, a) of log y = a + b log x."""
    b, a = np.polyfit(np.log(x), np.log(y), 1)
    return float(b), float(a)


def _at(law: tuple[float, float], x: np.ndarray) -> np.ndarray:
    return np.exp(law[1] + law[0] * np.log(x))


def _plus_minus(values: list[float]) -> str:
    return "{:+.4f} ± {:.4f}".format(*interval(values))
