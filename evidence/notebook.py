"""The lab notebook: which of V3's claims hold at a size that a laptop can run.

    python evidence/notebook.py [CLAIM ...] [--quick] [--page]

A claim is evidence/CLAIM.toml: what is said, a recipe, and two arms that differ by overrides. A row is one arm with one
seed: a run in runs/evidence, and its result in evidence/rows/CLAIM.json once it is done. A row whose claim file or
recipe has changed since is run again; one that was stopped goes on. --page only writes docs/evidence.md.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from baleen.config import Recipe, Strict, UserError, load_recipe, validated

HERE = Path(__file__).parent
# Student's t at 97.5 %, by degrees of freedom.
T_975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Claim(Strict):
    """What is said of `arms[1]` beside `arms[0]`, as a difference of `measure` relative to that of `arms[0]`."""

    says: str
    paper: str
    recipe: str
    overrides: tuple[str, ...] = ()
    arms: dict[str, tuple[str, ...]] = Field(min_length=2, max_length=2)
    measure: Literal["heldout_bpb", "loss", "max_violation_pooled"] = "heldout_bpb"
    expects: Literal["lower", "within"] = "lower"
    margin: float = Field(0.0, ge=0.0)  # of "within"
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=2, max_length=len(T_975))
    quick: bool = False
    not_run: str = "not run yet"  # why, as long as there are no rows

    def recipe_of(self, arm: str, seed: int) -> Recipe:
        return load_recipe(self.recipe, [*self.overrides, *self.arms[arm], f"train.seed={seed}"])

    def hash_of(self, arm: str, seed: int) -> str:
        """Of all that decides over a row's result, this claim's wording aside."""
        text = self.recipe_of(arm, seed).to_toml() + self.measure
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_claims(folder: Path = HERE) -> dict[str, Claim]:
    return {
        file.stem: validated(Claim, tomllib.loads(file.read_text(encoding="utf-8")), str(file))
        for file in sorted(folder.glob("*.toml"))
    }


def read_rows(name: str, claim: Claim, folder: Path = HERE) -> dict[tuple[str, int], dict[str, Any]]:
    """Finished rows by (arm, seed); those of an older claim or recipe are left out."""
    file = folder / "rows" / f"{name}.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    found = {(row["arm"], row["seed"]): row for row in rows}
    return {
        (arm, seed): found[arm, seed]
        for arm in claim.arms
        for seed in claim.seeds
        if (arm, seed) in found and found[arm, seed]["hash"] == claim.hash_of(arm, seed)
    }


def run_missing(name: str, claim: Claim, runs: Path, folder: Path = HERE) -> None:
    """Run what is missing or stale, seed by seed, and keep each row as soon as it is done."""
    rows = read_rows(name, claim, folder)
    for seed in claim.seeds:
        for arm in claim.arms:
            if (arm, seed) not in rows:
                rows[arm, seed] = run_row(name, claim, arm, seed, runs)
                file = folder / "rows" / f"{name}.json"
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8")


def run_row(name: str, claim: Claim, arm: str, seed: int, runs: Path) -> dict[str, Any]:
    """Raises KeyboardInterrupt if the run was stopped; it goes on the next time."""
    import torch

    from baleen.cost.card import cost_card
    from baleen.train.loop import train

    digest = claim.hash_of(arm, seed)
    run_dir = runs / f"{name}-{arm.replace(' ', '-')}-{seed}-{digest}"
    summary = train(claim.recipe_of(arm, seed), run_dir, resume=(run_dir / "checkpoints").exists())
    if summary["status"] != "done":
        raise KeyboardInterrupt
    hours = cost_card(run_dir)["device_hours"]
    shutil.rmtree(run_dir)  # the ledger stands beside it and stays
    return {
        "arm": arm,
        "seed": seed,
        "hash": digest,
        "value": summary[claim.measure],
        "tokens": summary["tokens"],
        "train_seconds": summary["train_seconds"],
        "device_hours": hours,
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.system()}, torch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
    }


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of its 95 % interval by Student's t)."""
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def verdict(claim: Claim, mean: float, half: float) -> str:
    low, high = mean - half, mean + half
    if claim.expects == "lower":
        return "holds" if high < 0 else "does not hold" if low > 0 else "can't be seen at this size"
    if max(abs(low), abs(high)) <= claim.margin:
        return "holds"
    return "does not hold" if low > claim.margin or high < -claim.margin else "can't be seen at this size"


def page(claims: dict[str, Claim], folder: Path = HERE) -> str:
    lines = [
        "# Evidence",
        "",
        "Made by `python evidence/notebook.py --page` from `evidence/`; not edited by hand. Differences are paired by",
        "seed and relative to the first arm; the interval is 95 % (Student's t) and not corrected for many claims.",
        "",
        "| Claim | The paper | Arms | Seen here | Verdict |",
        "|---|---|---|---|---|",
    ]
    hours = 0.0
    for name, claim in claims.items():
        rows, (control, treatment) = read_rows(name, claim, folder), claim.arms
        hours += sum(row["device_hours"] for row in rows.values())
        if len(rows) == 2 * len(claim.seeds):
            gaps = [rows[treatment, s]["value"] / rows[control, s]["value"] - 1 for s in claim.seeds]
            mean, half = interval(gaps)
            seen = f"{claim.measure} {mean:+.2%} ± {half:.2%}, {len(gaps)} seeds"
            how = verdict(claim, mean, half)
        else:
            seen, how = "", claim.not_run if not rows else f"{len(rows)} of {2 * len(claim.seeds)} rows are there"
        lines.append(f"| {claim.says} | {claim.paper} | {control}; {treatment} | {seen} | {how} |")
    return "\n".join([*lines, "", f"The rows above took {hours:.2f} device-hours.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--page", action="store_true")
    asked, claims = parser.parse_args(), load_claims()
    unknown = set(asked.claims) - set(claims)
    if unknown:
        raise UserError(f"no claim {min(unknown)!r}: there are {', '.join(claims)}")
    for name, claim in claims.items():
        if not asked.page and (not asked.claims or name in asked.claims) and (claim.quick or not asked.quick):
            run_missing(name, claim, HERE.parent / "runs" / "evidence")
    (HERE.parent / "docs" / "evidence.md").write_text(page(claims), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
