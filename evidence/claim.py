"""A claim: what is said, and the runs that put it to the test; its finished rows and what they say.

A row is one arm with one seed. It is kept in rows/HASH.json, by its recipe and by what makes its text and measures it:
claims that share an arm share its rows, and a row whose recipe has changed is a row no more. The package's own code is
not in the hash, and neither is attention.py: who changes what they compute takes the rows out.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from baleen.config import Strict, UserError, validated
from baleen.recipe import Recipe, load_recipe

HERE = Path(__file__).parent
# Student's t at 97.5 %, by degrees of freedom.
T_975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

SWEEP = "lr-sparse"  # tunes what no other sweep tunes
EXTENSIONS = ("extend-1k", "extend-4k")
UNSEEN = "can't be seen at this size"
PASSAGES = "passages.py"
MEASURED = 2  # counted up when rows are measured otherwise, so that older ones are not compared with new ones

Row = dict[str, Any]


class Claim(Strict):
    """What is said of the second arm beside the first: a difference of `measure`, relative to the first arm's, or of a
    share (`absolute`) the difference itself.

    Further arms are shown beside them; what is said of those is a claim of its own, with the same rows. A sweep
    (`expects` "least") says nothing: the overrides of its best arm are taken by the arms that it tunes, before their
    own.
    """

    says: str
    paper: str
    recipe: str = "base.toml"
    overrides: tuple[str, ...] = ()
    arms: dict[str, tuple[str, ...]] = Field(min_length=2)
    key_value_heads: dict[str, int] = {}  # by arm: plain attention with so many instead of MLA
    extended: bool = False  # arms are ways to a longer context: rows of context.py
    passages: bool = False  # on the conversations' text cut into short documents: passages.py
    tuned_by: dict[str, str] = {}  # by arm: another sweep than SWEEP
    measure: str = "heldout_bpb"
    shows: tuple[str, ...] = ()  # further measures
    absolute: bool = False
    expects: Literal["lower", "higher", "within", "least"] = "lower"
    margin: float = Field(0.0, ge=0.0)  # of "within": no worse than so much higher
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, max_length=len(T_975))
    quick: bool = False
    timed: bool = False  # what its arms take is shown beside: times.py
    notes: str = ""  # what a reader of the result must know
    not_run: str = "not run yet"  # why, as long as there are no rows


class Notebook:
    """All claims of a folder, with their rows."""

    def __init__(self, folder: Path = HERE):
        self.folder = folder
        self.claims = {
            file.stem: validated(Claim, tomllib.loads(file.read_text(encoding="utf-8")), str(file))
            for file in sorted((folder / "claims").glob("*.toml"))
        }

    def recipe(self, name: str, arm: str, seed: int) -> Recipe | None:
        """None as long as the sweep that tunes this arm is not done, or its best lies at the edge."""
        claim = self.claims[name]
        overrides = [*claim.overrides]
        if claim.expects != "least":
            sweep = claim.tuned_by.get(arm, SWEEP)
            best = self.best_arm(sweep)
            if best is None or self.at_edge(sweep, best):
                return None
            overrides += self.claims[sweep].arms[best]
        overrides += [*claim.arms[arm], f"train.seed={seed}"]
        return _recipe(self.folder / claim.recipe, tuple(overrides))

    def best_arm(self, sweep: str) -> str | None:
        """None as long as the sweep is not done."""
        if not self.complete(sweep):
            return None
        measure = self.claims[sweep].measure
        return min(self.claims[sweep].arms, key=lambda arm: statistics.mean(self.values(sweep, arm, measure)))

    def at_edge(self, sweep: str, best: str) -> bool:
        """Whether it is the first arm or the last: then the sweep says no more than where to look."""
        arms = list(self.claims[sweep].arms)
        return best in (arms[0], arms[-1])

    def require_inside(self, sweep: str) -> None:
        """Raises UserError for a sweep that is done and has its best arm at the edge."""
        best = self.best_arm(sweep)
        if best is not None and self.at_edge(sweep, best):
            raise UserError(f"{sweep}: the best is {best}, at the edge of what was tried: add an arm beyond it")

    def hash_of(self, name: str, arm: str, seed: int) -> str | None:
        """Of recipe, text and measures; neither of a claim's wording nor of the package's code."""
        claim, recipe = self.claims[name], self.recipe(name, arm, seed)
        if recipe is None:
            return None
        return _digest(recipe, claim.key_value_heads.get(arm), claim.extended, claim.passages)

    def row(self, name: str, arm: str, seed: int) -> Row | None:
        """The finished row, or None."""
        return self._kept(f"{self.hash_of(name, arm, seed)}")

    def _kept(self, stem: str) -> Row | None:
        file = self.folder / "rows" / f"{stem}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def write(self, row: Row) -> None:
        file = self.folder / "rows" / f"{row['hash']}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")

    def rows(self, name: str) -> list[Row]:
        claim = self.claims[name]
        found = (self.row(name, arm, seed) for seed in claim.seeds for arm in claim.arms)
        return [row for row in found if row is not None]

    def all_rows(self) -> list[Row]:
        """Of every claim, each once."""
        return list({row["hash"]: row for name in self.claims for row in self.rows(name)}.values())

    def complete(self, name: str) -> bool:
        return len(self.rows(name)) == len(self.claims[name].arms) * len(self.claims[name].seeds)

    def values(self, name: str, arm: str, measure: str) -> list[float]:
        """By seed, of an arm that is complete."""
        rows = [self.row(name, arm, seed) for seed in self.claims[name].seeds]
        return [row["measured"][measure] for row in rows if row is not None]

    def timing(self) -> Row | None:
        """What times.py found: {"seconds": {hash of an arm's first row: by turn, those of a median step}, ...}. The
        code of then, not of now: its date and machine stand beside."""
        return self._kept("times")

    def run_seconds(self, name: str) -> dict[str, list[float]] | None:
        """By arm: of all its steps, turn by turn; None as long as not all its arms are timed as they are now."""
        kept, seed, seconds = (self.timing() or {}).get("seconds", {}), self.claims[name].seeds[0], {}
        for arm in self.claims[name].arms:
            recipe, turns = self.recipe(name, arm, seed), kept.get(self.hash_of(name, arm, seed))
            if recipe is None or turns is None:
                return None
            steps = recipe.train.tokens / recipe.train.batch_tokens
            seconds[arm] = [turn * steps for turn in turns]
        return seconds

    def superseded(self) -> Row:
        """What became of no use, as its recipe or its code changed: {"rows", "device_hours", "usd"}. It was spent."""
        file = self.folder / "superseded.json"
        nothing = {"rows": 0, "device_hours": 0.0, "usd": 0.0}
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else nothing

    def supersede(self, row: Row | None) -> None:
        """Count a row that something new replaces."""
        if row is not None:
            before = self.superseded()
            after = {"rows": before["rows"] + 1}
            after |= {key: round(before[key] + row[key], 6) for key in ("device_hours", "usd")}
            (self.folder / "superseded.json").write_text(json.dumps(after, indent=1) + "\n", encoding="utf-8")

    def stale(self) -> list[Path]:
        """Files of rows that no claim asks for any more. Raises UserError as long as a sweep is not settled, for then
        nobody knows."""
        for name, claim in self.claims.items():
            if any(self.hash_of(name, arm, claim.seeds[0]) is None for arm in claim.arms):
                raise UserError(f"{name} is tuned by a sweep that is not done: run `make evidence` first")
        known = {row["hash"] for row in self.all_rows()} | {"times"}
        files = sorted((self.folder / "rows").glob("*.json"))
        return [file for file in files if file.stem not in known and not file.stem.startswith("study-")]

    def gaps(self, name: str, arm: str) -> list[float]:
        """By seed: how far the arm's measure is from the first arm's, relative to that unless it is `absolute`."""
        claim = self.claims[name]
        control = self.values(name, next(iter(claim.arms)), claim.measure)
        pairs = zip(control, self.values(name, arm, claim.measure), strict=True)
        return [b - a if claim.absolute else b / a - 1 for a, b in pairs]

    def verdict(self, name: str) -> str:
        """What the rows say of the claim, or why they say nothing."""
        claim, arms = self.claims[name], list(self.claims[name].arms)
        if not self.complete(name):
            done, wanted = len(self.rows(name)), len(arms) * len(claim.seeds)
            return f"{done} of {wanted} rows are there" if done else claim.not_run
        if claim.expects == "least":
            best = self.best_arm(name) or ""
            return f"{best}, at the edge: not taken" if self.at_edge(name, best) else f"taken: {best}"
        return judged(claim, *interval(self.gaps(name, arms[1])))


@cache
def _recipe(file: Path, overrides: tuple[str, ...]) -> Recipe:
    return load_recipe(file, overrides)


@cache
def _digest(recipe: Recipe, key_value_heads: int | None, extended: bool, passages: bool) -> str:
    decides: list[object] = [recipe.model_copy(update={"name": ""}).to_toml(), key_value_heads, MEASURED]
    decides += [load_extensions(), digest_of("needles.py"), digest_of("context.py")] if extended else []
    decides += [(HERE / PASSAGES).read_text(encoding="utf-8")] if passages else []
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


@cache
def load_extensions() -> list[str]:
    """The recipes of the two stages to a longer context."""
    return [(resources.files("baleen.recipes") / f"{name}.toml").read_text(encoding="utf-8") for name in EXTENSIONS]


def digest_of(script: str) -> str:
    """Of a file beside this one that makes text or measures."""
    return hashlib.sha256((HERE / script).read_bytes()).hexdigest()[:16]


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of its 95 % interval by Student's t); of one value nothing is known but itself."""
    if len(values) == 1:
        return values[0], math.inf
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def times(first: list[float], other: list[float]) -> tuple[float, float]:
    """How many times the first's seconds, turn by turn: (mean, half of its interval)."""
    return interval([b / a for a, b in zip(first, other, strict=True)])


def judged(claim: Claim, mean: float, half: float) -> str:
    low, high = mean - half, mean + half
    if claim.expects == "within":
        return "holds" if high <= claim.margin else "does not hold" if low > claim.margin else UNSEEN
    if claim.expects == "higher":
        low, high = -high, -low
    return "holds" if high < 0 else "does not hold" if low > 0 else UNSEEN
