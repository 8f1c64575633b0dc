"""The plan of a training step against the step: calibration and real training take turns on this machine.

    python bench/plan.py [--rounds 4] [--json]

Each round calibrates (`baleen cost calibrate`), then trains recipe S, recipe M and a dense network of S's shape, each
in a process of its own. Printed are medians over the rounds; an error is that of a round's plan beside its own step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from baleen.cost.calibrate import calibrate
from baleen.cost.plan import make_plan
from baleen.cost.plan_request import Request
from baleen.recipe import Recipe, load_recipe

NETWORKS = {"S": ("cpu-s", ()), "M": ("cpu-m", ()), "dense": ("cpu-s", ("model.first_k_dense_replace=6",))}
GIB = 1024**3


def train(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Seconds and bytes of real steps, measured in a process of its own."""
    asked = json.dumps({"recipes": [recipe.model_dump(mode="json")], "steps": steps})
    done = subprocess.run(
        [sys.executable, "-m", "baleen.train.probe"], input=asked, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)[0]


def plan(recipe: Recipe, hardware: Path, folder: Path) -> dict[str, Any]:
    path = folder / "recipe.toml"
    path.write_text(recipe.to_toml())
    return make_plan(Request(gpu="cpu", model=str(path), gpus=1, hardware_files=(hardware,)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="timed steps a round and network")
    parser.add_argument("--calibrate-seconds", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    planned: dict[str, list[dict[str, Any]]] = {name: [] for name in NETWORKS}
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in NETWORKS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            hardware = Path(folder) / f"hardware-{number}.toml"
            calibrate(hardware, "cpu", args.calibrate_seconds)
            print(hardware.read_text(), file=sys.stderr)
            for name, (recipe_name, sets) in NETWORKS.items():
                recipe = load_recipe(recipe_name, sets)
                measured[name].append(train(recipe, args.steps))
                planned[name].append(plan(recipe, hardware, Path(folder)))
                print(name, planned[name][-1]["step_seconds"], measured[name][-1], file=sys.stderr)
    rows = {}
    for name in NETWORKS:
        steps = [run["seconds"] for run in measured[name]]
        peak = statistics.median(run["peak_bytes"] for run in measured[name]) / GIB
        gib = statistics.median(run["memory_gib_per_rank"] for run in planned[name])
        # a round's plan beside that round's step: a host that is shared drifts from round to round
        errors = [run["step_seconds"] / step - 1 for run, step in zip(planned[name], steps, strict=True)]
        rows[name] = {
            "planned_seconds": statistics.median(run["step_seconds"] for run in planned[name]),
            "measured_seconds": statistics.median(steps),
            "relative_errors": errors,
            "relative_error": statistics.median(errors),
            "spread": max(steps) / min(steps) - 1,
            "planned_gib": gib,
            "measured_gib": peak,
            "memory_relative_error": gib / peak - 1,
        }
    if args.json:
        print(json.dumps(rows))
        return
    heads = ("planned", "measured", "error", "spread", "planned", "measured", "error")
    print(" " * 7 + "".join(f"{head:>10}" for head in heads))
    for name, row in rows.items():
        print(
            f"{name:<7}{row['planned_seconds']:>8.3f} s{row['measured_seconds']:>8.3f} s{row['relative_error']:>+10.1%}"
            f"{row['spread']:>10.1%}{row['planned_gib']:>6.2f} GiB{row['measured_gib']:>6.2f} GiB"
            f"{row['memory_relative_error']:>+10.1%}"
        )


if __name__ == "__main__":
    main()
