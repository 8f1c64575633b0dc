"""Predictions against published runs: errors by kind beside a baseline, and the fit of the calibration constants.

Fitting is least squares on logarithms with the constants' priors as a ridge and Huber weights against outliers.
Rows marked `anchor` are never fitted on; rows that are fitted on are predicted without their own source.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from baleen.config import UserError
from baleen.cost.calibration import CONSTANTS, Calibration, shipped_calibration
from baleen.cost.cases import Case, Prepared, implied_mfu, prepare, read_cases, shipped_cases
from baleen.cost.memory import GIB
from baleen.cost.step import Rooflines, rooflines, step_time

NEVER_FITTED = "anchor"
# Spread of a row about the truth (standard deviation of the logarithm): hours also hold what nobody published.
STEP_NOISE, RUN_NOISE = 0.10, 0.25
TIER_NOISE = {"A": 1.0, "B": 1.5, "C": 2.5}
HUBER = 1.5  # beyond so many deviations a row pulls no harder
# Memory that the allocator holds and nobody uses: reserved against allocated.
ALLOCATOR_SHARE = 1.05


class Item(NamedTuple):
    """A prepared case with its rooflines, ready to be predicted under many calibrations."""

    row: Prepared
    roof: Rooflines

    @property
    def published(self) -> float:
        """Seconds a token and GPU, from the rate or from the hours."""
        row = self.row
        if row.rate:
            return 1 / row.rate
        assert row.hours and row.tokens
        return row.hours * 3600 / row.tokens

    @property
    def noise(self) -> float:
        base = RUN_NOISE if self.row.goodput_counts else STEP_NOISE
        return base * TIER_NOISE.get(self.row.case.text["tier"], 2.5)


def predicted(item: Item, calibration: Calibration) -> float:
    """Seconds a token and GPU: of a step, or of a run with its goodput."""
    row = item.row
    step = step_time(row.work, calibration, item.roof).seconds
    seconds = step * row.work.layout.devices / row.work.tokens
    if row.case.text["source"].startswith("NVIDIA"):
        seconds *= calibration["vendor"]
    if row.untuned:
        seconds *= calibration["untuned"]
        if row.work.hardware.generation == "hopper":
            seconds *= calibration["untuned_hopper"]
    if row.goodput_counts:
        seconds /= calibration["goodput"]
    return seconds


def fit(items: Sequence[Item], start: Calibration | None = None) -> Calibration:
    """Constants that explain the items best, held near their priors; plain numpy, Gauss-Newton on the logarithms."""
    names = list(CONSTANTS)
    prior = np.log([CONSTANTS[name].prior for name in names])
    weight_of_prior = np.array([1 / CONSTANTS[name].sigma for name in names])
    theta = np.log([(start or Calibration())[name] for name in names])
    noise = np.array([item.noise for item in items])

    def residuals(theta: np.ndarray) -> np.ndarray:
        calibration = Calibration(dict(zip(names, np.exp(theta).tolist(), strict=True)))
        return np.array([math.log(predicted(item, calibration) / item.published) for item in items]) / noise

    for _ in range(6):
        r = residuals(theta)
        step = 1e-3
        jacobian = np.stack([(residuals(theta + step * unit) - r) / step for unit in np.eye(len(names))], axis=1)
        huber = np.sqrt(np.minimum(1.0, HUBER / np.maximum(np.abs(r), 1e-9)))[:, None]
        left = np.vstack([jacobian * huber, np.diag(weight_of_prior)])
        right = np.concatenate([-r * huber[:, 0], weight_of_prior * (prior - theta)])
        change = np.linalg.lstsq(left, right, rcond=None)[0]
        theta = theta + np.clip(change, -0.5, 0.5)
        if np.abs(change).max() < 1e-4:
            break
    return Calibration(dict(zip(names, np.exp(theta).tolist(), strict=True)))


def leave_one_source_out(items: Sequence[Item]) -> dict[str, Calibration]:
    """For each source the constants fitted without it."""
    start = fit(items)
    sources = sorted({item.row.case.source for item in items})
    return {source: fit([i for i in items if i.row.case.source != source], start) for source in sources}


def baseline_mfu(item: Item, known: Iterable[Item]) -> float | None:
    """Median MFU of other sources with the same GPU generation, type and precision; wider groups where that is empty."""
    others = [other for other in known if other.row.case.source != item.row.case.source]

    def key(row: Prepared) -> tuple[str, str, str]:
        return row.work.hardware.generation, row.case.text["type"], row.work.precision

    for width in (3, 2, 1, 0):
        same = [o for o in others if key(o.row)[:width] == key(item.row)[:width]]
        if same:
            return median(implied_mfu(1 / o.published, o.row.work) for o in same)
    return None
