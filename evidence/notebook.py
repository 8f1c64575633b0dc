"""The lab notebook: which of V3's claims hold at a size that a laptop can run.

    python evidence/notebook.py [CLAIM ...] [--quick] [--page] [--list] [--retire]

A claim is evidence/claims/CLAIM.toml: what is said, a recipe, and arms that differ by overrides. A row is one arm with
one seed; what is missing is run, sweeps before the claims that they tune, and kept in evidence/rows; studies and
timings come after. Stopped, the same command goes on. --quick runs two rows again, beside those that are kept. --page
only writes the pages. --retire takes rows away that no claim asks for any more, and keeps count of what they cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from claim import HERE, SWEEP, Notebook, Row, interval
from page import write_pages
from studies import STUDIES, run_study, study_is_done
from times import time_arms

from baleen.config import UserError

ROOT = HERE.parent
RUNS = ROOT / "runs" / "evidence"


def run_missing(notebook: Notebook, names: list[str], runs: Path) -> None:
    """Seed by seed, so that whatever is there when it is stopped is paired."""
    for name in sorted(names, key=lambda name: notebook.claims[name].expects != "least"):
        claim = notebook.claims[name]
        for seed in claim.seeds:
            for arm in claim.arms:
                if notebook.row(name, arm, seed) is None:
                    notebook.write(run_row(notebook, name, arm, seed, runs))
        if claim.expects == "least":
            notebook.require_inside(name)


def run_row(notebook: Notebook, name: str, arm: str, seed: int, runs: Path) -> Row:
    """Raises UserError if the sweep that tunes this arm is not done or has its best at the edge, KeyboardInterrupt if
    the row was stopped."""
    from context import extend_row
    from row import account_of, say, thrown_away, train_row

    claim, recipe = notebook.claims[name], notebook.recipe(name, arm, seed)
    digest = notebook.hash_of(name, arm, seed)
    if recipe is None or digest is None:
        notebook.require_inside(claim.tuned_by.get(arm, SWEEP))
        raise UserError(f"{name} is tuned by a sweep: run {claim.tuned_by.get(arm, SWEEP)} first")
    say(f"{name}: {arm}, seed {seed}")
    run_dirs = [runs / digest]
    if claim.extended:
        measured, run_dirs = extend_row(recipe, runs / digest, cache=runs / "data")
    else:
        heads = claim.key_value_heads.get(arm)
        measured = train_row(recipe, runs / digest, heads, cache=runs / "data", passages=claim.passages)
    row = {"hash": digest, "claim": name, "arm": arm, "seed": seed, "measured": measured, **account_of(run_dirs)}
    thrown_away([run_dir for run_dir in run_dirs if run_dir.name.startswith(digest)])  # a base is for several arms
    return row


def run_again(notebook: Notebook, runs: Path) -> bool:
    """The first seed of the first two arms of the claim marked quick; whether each lies where 95 % of
    further rows of its arm would."""
    name = next(name for name, claim in notebook.claims.items() if claim.quick)
    claim, all_within = notebook.claims[name], True
    if not notebook.complete(name):
        raise UserError(f"{name} has no rows to compare with yet: run `make evidence` first")
    for arm in list(claim.arms)[:2]:
        kept = notebook.values(name, arm, claim.measure)
        now = run_row(notebook, name, arm, claim.seeds[0], runs)["measured"][claim.measure]
        # Other kernels or another CPU make of a seed another draw: it lies where one value more of its kind would.
        half = interval(kept)[1] * (len(kept) + 1) ** 0.5
        within = abs(now - statistics.mean(kept)) <= half
        all_within &= within
        print(
            f"{name}, {arm}, seed {claim.seeds[0]}: {claim.measure} {now:.4f}, kept {kept[0]:.4f} "
            f"({now / kept[0] - 1:+.2%}), interval {statistics.mean(kept):.4f} ± {half:.4f}: "
            f"{'within' if within else 'OUTSIDE'}"
        )
    return all_within


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--retire", action="store_true")
    asked, notebook = parser.parse_args(), Notebook()
    unknown = set(asked.claims) - set(notebook.claims)
    if unknown:
        raise UserError(f"no claim {min(unknown)!r}: there are {', '.join(notebook.claims)}")
    if asked.quick:
        sys.exit(0 if run_again(notebook, RUNS / "quick") else 1)
    if asked.list:
        for name, claim in notebook.claims.items():
            print(f"{len(notebook.rows(name)):3} of {len(claim.arms) * len(claim.seeds):3} rows  {name}")
        return
    if asked.retire:
        for file in notebook.stale():
            notebook.supersede(json.loads(file.read_text(encoding="utf-8")))
            file.unlink()
    try:
        if not asked.page and not asked.retire:
            run_missing(notebook, asked.claims or list(notebook.claims), RUNS)
            for name in STUDIES if not asked.claims else ():
                if not study_is_done(name):
                    run_study(name, RUNS)
            timed = [name for name, claim in notebook.claims.items() if claim.timed]
            if not asked.claims and any(notebook.run_seconds(name) is None for name in timed):
                time_arms(notebook, RUNS)
    finally:
        write_pages(notebook, ROOT)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
