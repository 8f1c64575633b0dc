"""Does RL teach what more fine-tuning does not? Three seeds of chain sums, one of sorting sums, each with its control.

    python bench/reason.py [NAME ...] [--run runs/bench-reason] [--seeds 3] [--json]

NAME: chain_sum-0 and so on, or sorting-0; all without one. Resumable: what is done is not done again. Kept in
bench/results/reason.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from contenders import machine
from rich.console import Console

from baleen.align.reason import run_reason
from baleen.align.recipe import AlignRecipe, load_align_recipe
from baleen.align.tasks import Sorting
from baleen.recipe import read_recipe

RESULTS = Path(__file__).parent / "results" / "reason.json"
KEYS = ("accuracy_before", "accuracy_after", "accuracy_sft_control")
MORE = ("rl_seconds", "rl_usd")


def of_seed(recipe: AlignRecipe, seed: int) -> AlignRecipe:
    """The recipe with another seed for its data, weights and rollouts."""
    sft, rl = recipe.stages
    stages = (
        sft.model_copy(update={"train": sft.train.model_copy(update={"seed": seed})}),
        rl.model_copy(update={"seed": seed}),
    )
    return recipe.model_copy(update={"stages": stages})


def of_sorting(recipe: AlignRecipe) -> AlignRecipe:
    """The recipe with sums to be sorted, whose thoughts are longer."""
    sft, rl = recipe.stages
    assert recipe.model is not None
    model = recipe.model.model_copy(update={"max_position_embeddings": 256})
    sft = sft.model_copy(update={"train": sft.train.model_copy(update={"seq_len": 256})})
    rl = rl.model_copy(update={"sampling": rl.sampling.model_copy(update={"max_tokens": 160})})
    task = Sorting(numbers=(2, 3), terms=(3, 4))
    return recipe.model_copy(update={"tasks": (task,), "stages": (sft, rl), "model": model})


def runs(seeds: int) -> dict[str, AlignRecipe]:
    recipe = load_align_recipe("reason")
    named = {f"chain_sum-{seed}": of_seed(recipe, seed) for seed in range(seeds)}
    return named | {"sorting-0": of_sorting(recipe)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--run", type=Path, default=Path("runs/bench-reason"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    console, wanted = Console(stderr=True), runs(arguments.seeds)
    if unknown := set(arguments.names) - set(wanted):
        sys.exit(f"no run {min(unknown)}: there are {', '.join(wanted)}")
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = {}
    for name, recipe in wanted.items():
        if arguments.names and name not in arguments.names:
            continue
        folder = arguments.run / name
        done = folder / "summary.json"
        if done.is_file() and read_recipe(AlignRecipe, folder / "recipe.toml") == recipe:
            summary: dict[str, Any] = json.loads(done.read_text())
        else:
            summary = run_reason(recipe, folder, console)  # which refuses a folder of another recipe
        if summary.get("status") == "stopped":
            sys.exit("stopped: run it again to go on")
        wanted_keys = (*KEYS, "answer_tokens", "votes", "plateau_gain")
        found[name] = {key: summary[key] for key in summary if key.startswith(wanted_keys) or key in MORE}
        console.print(f"{name}: " + ", ".join(f"{key} {summary[key]:.1%}" for key in KEYS))
        measured = datetime.date.fromtimestamp(done.stat().st_mtime)
        kept[name] = found[name] | {"date": measured.isoformat(), "machine": machine()}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
