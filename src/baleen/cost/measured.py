"""What measurements of a machine mean: the few rates that explain its products and its training steps.

A product takes FLOPs over a rate, its operands over another, and a call. A training step takes its products and its
attention (times what they are slower inside training), streams its activations, pays for each layer and for each copy
that goes to an expert, and updates; the update is timed by itself.
Sums of non-negative terms, fitted by least squares on relative errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from baleen.cost.architecture import from_model_config
from baleen.cost.calibration import Calibration
from baleen.cost.hardware import Hardware
from baleen.cost.layout import Layout
from baleen.cost.ranking import memory_of
from baleen.cost.step import step_time
from baleen.cost.workload import Workload
from baleen.recipe import Recipe

INSIDE_TRAINING = (1.0, 0.2)  # products and attention inside training against alone: what is believed, and how firmly

OVERHEADS = ("layer_overhead_us", "copy_overhead_ns")  # cells of time that is spent whatever the widths


class Products(NamedTuple):
    flops: float  # per second
    operand_bytes: float | None  # per second; None where products never wait for their operands
    call_seconds: float


class Step(NamedTuple):
    """A training step that was timed; peak_bytes None where the system does not tell."""

    recipe: Recipe
    seconds: float
    update_seconds: float  # of those: clipping and the optimizer
    precision: str
    peak_bytes: float | None


def fit_products(products: Sequence[Sequence[float]], width: int) -> Products:
    """From [m, n, k, seconds] of products of numbers of `width` bytes."""
    m, n, k, seconds = np.array(products, dtype=float).T
    terms = np.stack([2 * m * n * k, width * (m * k + k * n + m * n), np.ones_like(m)], axis=1)
    per_flop, per_byte, call = non_negative(terms / seconds[:, None], np.ones_like(seconds))
    assert per_flop > 0, "a product's time must grow with its FLOPs"
    return Products(1 / per_flop, 1 / per_byte if per_byte else None, call)


def fit_training(name: str, cells: dict[str, float], steps: Sequence[Step]) -> dict[str, float]:
    """The cells of a device with those that only training shows: streaming_tb_s, layer_overhead_us, copy_overhead_ns,
    update_tb_s, process_gb; and with products and attention as slow as they are inside training."""

    def device(**changes: float) -> Hardware:
        return Hardware.model_validate({"name": name, "title": name, "generation": "cpu", **cells, **changes})

    unit = {"streaming_tb_s": 1.0, "update_tb_s": 1.0}
    bare = device(**unit)
    overheads = [device(**unit, **{cell: 1.0}) for cell in OVERHEADS]
    terms, updates = [], []
    for step in steps:
        phases, *longer = (step_time(workload(step, on), Calibration()).phases for on in (bare, *overheads))
        products = phases["matmul"] + phases["grouped_matmul"] + phases["attention"]
        added = [with_one["elementwise"] - phases["elementwise"] for with_one in longer]
        terms.append([products, phases["elementwise"], *added])
        updates.append(phases["optimizer"])
    seconds = np.array([step.seconds - step.update_seconds for step in steps])
    believed, deviation = INSIDE_TRAINING
    rows = np.vstack([np.array(terms) / seconds[:, None], [[0.1 / deviation, *[0] * (1 + len(OVERHEADS))]]])
    found = non_negative(rows, np.append(np.ones(len(steps)), 0.1 / deviation * believed))
    slower, stream, *overhead = map(float, found)
    out = dict(cells)
    for cell in cells:
        if cell.startswith(("achieved_", "product_tb_s_", "attention_")):
            out[cell] /= slower
        elif cell.startswith("product_call_us_"):
            out[cell] *= slower
    if stream:
        out["streaming_tb_s"] = 1 / stream
    # of sums: a large network's update, which no cache holds, says most
    out["update_tb_s"] = sum(updates) / sum(step.update_seconds for step in steps)
    out |= dict(zip(OVERHEADS, overhead, strict=True))
    beside = [step.peak_bytes - memory.total for step in steps
              if step.peak_bytes and (memory := memory_of(workload(step, bare)))]  # fmt: skip
    if beside:
        out["process_gb"] = max(0.0, float(np.median(beside))) / 1e9
    return out


def workload(step: Step, on: Hardware) -> Workload:
    """A recipe's step as Baleen runs it on one machine."""
    train = step.recipe.train
    sequences = train.batch_tokens // train.seq_len
    layout = Layout(devices=1, zero=0, recompute="none", micro_batch=train.micro_batch_size or sequences)
    return Workload(
        arch=from_model_config(step.recipe.model),
        hardware=on,
        layout=layout,
        precision=step.precision,
        seq_len=train.seq_len,
        global_batch=sequences,
        mtp=step.recipe.model.num_nextn_predict_layers > 0,
        node_limit=None,
    )


def non_negative(terms: np.ndarray, target: np.ndarray) -> Any:
    """Least squares without negative coefficients: the best of all subsets of the few terms."""
    best: tuple[float, np.ndarray] | None = None
    count = terms.shape[1]
    for chosen in (list(c) for size in range(1, count + 1) for c in combinations(range(count), size)):
        found = np.linalg.lstsq(terms[:, chosen], target, rcond=None)[0]
        error = float(((terms[:, chosen] @ found - target) ** 2).sum())
        if (found >= 0).all() and (best is None or error < best[0]):
            whole = np.zeros(count)
            whole[chosen] = found
            best = error, whole
    assert best is not None
    return best[1]
