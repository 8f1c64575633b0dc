"""Does RL teach what more fine-tuning does not? Three seeds of chain sums, one of countdown by signs, with controls.

    python bench/reason.py [NAME ...] [--run runs/bench-reason] [--seeds 3] [--json]

NAME: chain_sum-0 and so on, or signs-0 (not doubled so far: docs/reasoning.md); all without one. Resumable: what is
done is not done again. Kept in bench/results/reason.json.
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
from baleen.align.tasks import Signs

RESULTS = Path(__file__).parent / "results" / "reason.json"
KEYS = ("accuracy_before", "accuracy_after", "accuracy_sft_control")
MORE = ("plateau_gain", "rl_seconds", "rl_usd")


def of_seed(recipe: AlignRecipe, seed: int) -> AlignRecipe:
    """The recipe with another seed for its data, weights and rollouts."""
    sft, rl = recipe.stages
    stages = (
        sft.model_copy(update={"train": sft.train.model_copy(update={"seed": seed})}),
        rl.model_copy(update={"seed": seed}),
    )
    return recipe.model_copy(update={"stages": stages})


def of_signs(recipe: AlignRecipe) -> AlignRecipe:
    """The recipe with countdown by plus and minus, which has longer thoughts; who hurries shows no search."""
    sft, rl = recipe.stages
    assert recipe.model is not None
    train = sft.train.model_copy(update={"tokens": 2_112_000, "batch_tokens": 2112, "seq_len": 352})
    rl = rl.model_copy(update={"steps": 32, "sampling": rl.sampling.model_copy(update={"max_tokens": 320})})
    model = recipe.model.model_copy(update={"max_position_embeddings": 384})
    stages = (sft.model_copy(update={"train": train}), rl)
    return recipe.model_copy(update={"tasks": (Signs(numbers=(5, 5), largest=9),), "stages": stages, "model": model})


def runs(seeds: int) -> dict[str, AlignRecipe]:
    recipe = load_align_recipe("reason")
    named = {f"chain_sum-{seed}": of_seed(recipe, seed) for seed in range(seeds)}
    return named | {"signs-0": of_signs(recipe)}


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
        summary: dict[str, Any] = (
            json.loads(done.read_text()) if done.is_file() else run_reason(recipe, folder, console)
        )
        if summary.get("status") == "stopped":
            sys.exit("stopped: run it again to go on")
        found[name] = {key: summary[key] for key in summary if key.startswith((*KEYS, "answer_tokens")) or key in MORE}
        console.print(f"{name}: " + ", ".join(f"{key} {summary[key]:.1%}" for key in KEYS))
        measured = datetime.date.fromtimestamp(done.stat().st_mtime)
        kept[name] = found[name] | {"date": measured.isoformat(), "machine": machine()}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
