"""How long a step takes: all arms of the claims that are `timed`, in turns, so on a machine on which nothing else runs.

    python evidence/times.py

Kept in rows/times.json, all of one sitting: if one arm is missing or has changed, all are timed again. The rows
themselves may be run side by side, for nothing that they say is a time.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from claim import HERE, Notebook

from baleen.config import UserError
from baleen.train.loop import run_stage
from baleen.train.precision import keep_freed_memory
from baleen.train.trainer import Trainer

WARM, ROUNDS, STEPS = 4, 7, 6  # steps before, turns of each arm, and steps of a turn


def time_arms(notebook: Notebook, runs: Path) -> None:
    """Raises UserError as long as a sweep that tunes one of the claims is not done."""
    from row import account_of, say, text_of, thrown_away, trainer_of

    keep_freed_memory()
    run_dir = runs / "times"
    run_dir.mkdir(parents=True, exist_ok=True)
    trainers: dict[str, Trainer] = {}
    for name, claim in notebook.claims.items():
        for arm in claim.arms if claim.timed else ():
            recipe, digest = notebook.recipe(name, arm, claim.seeds[0]), notebook.hash_of(name, arm, claim.seeds[0])
            if recipe is None or digest is None:
                raise UserError(f"{name} is tuned by a sweep that is not done: run `make evidence` first")
            if digest not in trainers:
                heads = claim.key_value_heads.get(arm)
                trainers[digest] = trainer_of(recipe, text_of(recipe, runs / "data"), heads)
    seconds: dict[str, list[float]] = {digest: [] for digest in trainers}
    with run_stage(next(iter(trainers.values())).recipe.cost, run_dir, "eval"):
        for turn in range(-1, ROUNDS):
            say(f"how long a step takes, {len(trainers)} arms: turn {turn + 1} of {ROUNDS}")
            first = turn % len(trainers)
            for digest in [*trainers][first:] + [*trainers][:first]:
                steps = [trainers[digest].step().seconds for _ in range(WARM if turn < 0 else STEPS)]
                if turn >= 0:
                    seconds[digest].append(statistics.median(steps))
    notebook.supersede(notebook.timing())
    notebook.write({"hash": "times", "seconds": seconds, **account_of([run_dir])})
    thrown_away([run_dir])  # the next sitting is another run


if __name__ == "__main__":
    try:
        time_arms(Notebook(), HERE.parent / "runs" / "evidence")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
