"""How long a step takes: the arms of a claim in turns, so on a machine on which nothing else runs.

    python evidence/times.py [CLAIM ...]

Of every claim that is `timed`, whatever is missing if none is named. Kept in rows/time-CLAIM.json. The rows themselves
may be run side by side, for nothing that they say is a time.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from claim import HERE, Notebook

from baleen.config import UserError
from baleen.train.loop import run_stage
from baleen.train.precision import keep_freed_memory
from baleen.train.trainer import Trainer

WARM, ROUNDS, STEPS = 4, 7, 6  # steps before, turns of each arm, and steps of a turn


def time_claim(notebook: Notebook, name: str, runs: Path) -> None:
    """Raises UserError as long as a sweep that tunes the claim is not done."""
    from row import account_of, say, text_of, trainer_of

    claim, seed = notebook.claims[name], notebook.claims[name].seeds[0]
    say(f"{name}: how long a step takes")
    keep_freed_memory()
    run_dir = runs / f"time-{name}"
    run_dir.mkdir(parents=True, exist_ok=True)
    trainers: dict[str, Trainer] = {}
    for arm in claim.arms:
        recipe = notebook.recipe(name, arm, seed)
        if recipe is None:
            raise UserError(f"{name} is tuned by a sweep that is not done: run `make evidence` first")
        trainers[arm] = trainer_of(recipe, text_of(recipe, runs / "data"), claim.key_value_heads.get(arm))
    seconds: dict[str, list[float]] = {arm: [] for arm in trainers}
    with run_stage(next(iter(trainers.values())).recipe.cost, run_dir, "eval"):
        for turn in range(-1, ROUNDS):
            for arm, trainer in trainers.items():
                steps = [trainer.step().seconds for _ in range(WARM if turn < 0 else STEPS)]
                if turn >= 0:
                    seconds[arm].append(statistics.median(steps))
    account = account_of([run_dir])
    kept = {"of": {arm: notebook.hash_of(name, arm, seed) for arm in claim.arms}, "seconds": seconds}
    file = notebook.folder / "rows" / f"time-{name}.json"
    file.write_text(json.dumps(kept | account, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    notebook = Notebook()
    timed = [name for name, claim in notebook.claims.items() if claim.timed]
    for name in sys.argv[1:] or [name for name in timed if notebook.step_seconds(name) is None]:
        if name not in timed:
            raise UserError(f"no timed claim {name!r}: there are {', '.join(timed)}")
        time_claim(notebook, name, HERE.parent / "runs" / "evidence")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
