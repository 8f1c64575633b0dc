"""What a placement of experts is worth on the loads that a run recorded: the busiest GPU over the mean, before, after.

A placement knows the past alone: each record of the trace is served by the placement that the record before it asks
for, as V3 places its experts anew every ten minutes from the loads of its service (arXiv 2412.19437 §3.4).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from baleen.config import UserError
from baleen.cost.placement import Floats, place_experts


def read_loads(run: Path) -> Floats:
    """[records, L, E]: the share of the tokens of a batch that went to each expert, from a run's metrics.jsonl."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("}\n"):
            lines.pop()  # torn: the run was killed, or is under way
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"{run} has no metrics.jsonl that can be read ({error}): give the directory of a run") from None
    loads = [row["expert_load"] for row in rows if row.get("expert_load")]
    if len(loads) < 2:
        raise UserError(
            f"{run} recorded the experts' load {len(loads)} times: two are needed: train for longer, without --only"
        )
    layers = min(map(len, loads))  # those of MTP come last, and are missing where it was left out
    return np.array([load[:layers] for load in loads])


def place_on_trace(run: Path, *, gpus: int, nodes: int = 1, groups: int = 1, redundant: int = 0) -> dict[str, Any]:
    """{records, layers, experts, gpus, nodes, redundant, before, after, set}; `set` is a --set of `baleen cost plan`.

    before: experts in order, as training holds them; after: with `redundant` copies, placed by `place_experts`. Both
    are means over records and layers. Raises UserError where counts do not divide.
    """
    loads = read_loads(run)
    records, layers, experts = loads.shape
    if gpus < 1 or experts % gpus:
        near = min((n for n in range(1, experts + 1) if experts % n == 0), key=lambda n: abs(n - gpus))
        raise UserError(f"{experts} experts do not divide over {gpus} GPUs: the nearest number that does is {near}")
    if nodes > 1 and groups % nodes:  # a placement would then go by GPUs alone
        raise UserError(f"{nodes} nodes do not divide {groups} groups: give the groups of the router, or one node")
    in_order, placed = [], []
    for known, load in zip(loads, loads[1:], strict=False):
        in_order.append(load.reshape(layers, gpus, -1).sum(2))
        placed.append(place_experts(known, experts + redundant, groups, nodes, gpus).gpu_load(load, gpus))
    before, after = _imbalance(in_order), _imbalance(placed)
    return {
        "records": records, "layers": layers, "experts": experts, "gpus": gpus, "nodes": nodes,
        "redundant": redundant, "before": before, "after": after, "set": f"routing_imbalance={after:.4f}",
    }  # fmt: skip


def _imbalance(loads: list[Floats]) -> float:
    load_RLG = np.stack(loads)
    return float((load_RLG.max(-1) / load_RLG.mean(-1)).mean())
