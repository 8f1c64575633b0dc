"""Quality per second: Baleen beside the best dense models, with AdamW and with Muon, on one text.

    python bench/quality.py [--minutes 20] [--grid-minutes 3] [--recipe quality.toml] [--rows FILE] [--json]

Learning rate and size of each are tuned in short runs until the best has a worse neighbour on every side. Then each
trains for --minutes, and Baleen for half of them. Runs that are compared take turns of a few seconds, each on a clock
of its own, which stands still while held-out text is scored and while a dense model is compiled: a machine that slows
down slows all of them. What has ended is kept in --rows: stopped, the same command goes on. Two hours and a half on two
cores. What it finds without an option is kept in bench/results/quality.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from contenders import machine
from dense import Dense, DenseTrainer, active_parameters

from baleen.config import ModelConfig
from baleen.data.loader import Loader
from baleen.data.prepare import Prepared, prepare
from baleen.eval.bits_per_byte import bits_per_byte
from baleen.model.transformer import Transformer
from baleen.parallel.ranks import fingerprint_of_code
from baleen.recipe import Recipe, load_recipe
from baleen.train.precision import keep_freed_memory
from baleen.train.trainer import Trainer

SCORES = 10  # of held-out text, on the way of a long run
TURN_SECONDS = 5.0
LR_RATIO, SIZE_RATIO = 2.0, 1.5  # between neighbours of the grids
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "quality.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Contestant:
    """Who races: its optimizer and the middle of its learning rates. Size 0 is the recipe's model or, of a dense one,
    its active size; each size beyond has its widths times SIZE_RATIO."""

    name: str
    optimizer: str
    lr: float
    dense: bool

    def recipe(self, base: Recipe, *, lr: float, size: int, minutes: float) -> Recipe:
        changes: Row = {"optimizer": self.optimizer, "lr": lr, "minutes": minutes}
        model = base.model if self.dense else widened(base.model, SIZE_RATIO**size)
        return base.model_copy(update={"model": model, "train": base.train.model_copy(update=changes)})

    def trainer(self, recipe: Recipe, prepared: Prepared, size: int) -> Trainer | DenseTrainer:
        loader = Loader(prepared.train, seed=recipe.train.seed)
        if self.dense:
            with torch.device("meta"):
                active = active_parameters(Transformer(recipe.model))
            return DenseTrainer(recipe, Dense(recipe, active, SIZE_RATIO**size), loader)
        model = Transformer(recipe.model)
        model.init_weights(recipe.train.seed)
        return Trainer(recipe, model, loader)


def widened(model: ModelConfig, ratio: float) -> ModelConfig:
    """Heads stay as wide and as many as they are."""
    widths = ("hidden_size", "q_lora_rank", "kv_lora_rank", "intermediate_size", "moe_intermediate_size")
    return model.model_copy(update={name: round(ratio * getattr(model, name) / 16) * 16 for name in widths})


@dataclass(frozen=True)
class Entry:
    """A contestant at one place of its grid."""

    who: Contestant
    lr: float
    size: int


class Race:
    """The runs, each by its settings and its code; those that have been run before are read from the file."""

    def __init__(self, base: Recipe, prepared: Prepared, path: Path):
        self._base, self._prepared, self._path = base, prepared, path
        self._rows: dict[str, Row] = json.loads(path.read_text()) if path.exists() else {}

    def run(self, entries: list[Entry], *, minutes: float, scores: int = 1) -> list[Row]:
        """Trains each for `minutes`, by turns: {bits_per_byte, tokens, seconds, tokens_per_second, curve, ...}."""
        runs, names = [], []
        for entry in entries:
            recipe = entry.who.recipe(self._base, lr=entry.lr, size=entry.size, minutes=minutes)
            name = f"{entry.who.name}, size {entry.size:+d}, lr {entry.lr:.3g}, {minutes:g} minutes"
            names.append(f"{name}, {fingerprint(recipe)}, {machine()['cpu']}")
            if names[-1] not in self._rows:
                trainer = entry.who.trainer(recipe, self._prepared, entry.size)
                runs.append((names[-1], entry, Run(trainer, self._prepared, scores)))
        while any(not run.trainer.done for _, _, run in runs):
            for _, _, run in runs:
                run.go_on(TURN_SECONDS)
        for name, entry, run in runs:
            row = {"name": entry.who.name, "lr": entry.lr, "size": entry.size} | run.row()
            self._rows[name] = row | {"date": datetime.date.today().isoformat()}
            print(f"  {name}: {row['tokens']:,} tokens, {row['bits_per_byte']:.4f} bits per byte", file=sys.stderr)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._rows, indent=1) + "\n")
        return [self._rows[name] for name in names]

    def tuned(self, who: Contestant, minutes: float) -> list[Row]:
        """Runs from the middle of the grid towards ever better neighbours; the first is the best one, with all its
        neighbours among the others."""
        tried: dict[tuple[int, int], Row] = {}
        best = (0, 0)
        while True:
            step, size = at = best
            sizes, rates = [(step, size - 1), (step, size + 1)], [(step - 1, size), (step + 1, size)]
            for near in (sizes, rates):
                places = [place for place in (at, *near) if place not in tried]
                entries = [Entry(who, who.lr * LR_RATIO ** place[0], place[1]) for place in places]
                tried |= zip(places, self.run(entries, minutes=minutes), strict=True)
                best = min((at, *near), key=lambda place: tried[place]["bits_per_byte"])
                if best != at:
                    break
            else:
                return sorted(tried.values(), key=lambda row: row["bits_per_byte"])


class Run:
    """A training with a clock of its own, and the held-out text scored on the way."""

    def __init__(self, trainer: Trainer | DenseTrainer, prepared: Prepared, scores: int):
        self.trainer, self._prepared, self._scores = trainer, prepared, scores
        self._curve: list[dict[str, float]] = []

    def go_on(self, seconds: float) -> None:
        """Trains for so long, or to the end."""
        counters, started = self.trainer.counters, time.monotonic()
        before = counters.wall_seconds
        while not self.trainer.done and counters.wall_seconds - before < seconds:
            self.trainer.step()
            counters.wall_seconds = before + time.monotonic() - started
        share = self.trainer.position / self.trainer.recipe.train.tokens
        if before < counters.wall_seconds and (self.trainer.done or share * self._scores >= len(self._curve) + 1):
            self._score()

    def _score(self) -> None:
        model: Any = self.trainer.model
        window = self.trainer.recipe.train.seq_len
        bits = bits_per_byte(model, self._prepared.tokenizer, self._prepared.heldout, window=window)["bits_per_byte"]
        bits = bits if math.isfinite(bits) else math.inf  # NaN would count as the best
        self._curve.append({"seconds": self.trainer.counters.wall_seconds, "bits_per_byte": bits})

    def row(self) -> Row:
        counters = self.trainer.counters
        return {
            "bits_per_byte": self._curve[-1]["bits_per_byte"],
            "tokens": counters.tokens,
            "seconds": counters.wall_seconds,
            "tokens_per_second": counters.tokens / counters.wall_seconds,
            "parameters": sum(p.numel() for p in self.trainer.model.parameters()),
            "curve": self._curve,
        }


def fingerprint(recipe: Recipe) -> str:
    """Of what a run follows: the recipe, and the code that trains it."""
    digest = blake2b(recipe.to_toml().encode() + fingerprint_of_code().encode(), digest_size=6)
    for file in ("dense.py", Path(__file__).name):
        digest.update((HERE / file).read_bytes())
    return digest.hexdigest()


def first_reached(curve: list[dict[str, float]], bits: float) -> float | None:
    """Seconds of the first score that is as good; None where there is none."""
    return next((point["seconds"] for point in curve if point["bits_per_byte"] <= bits), None)


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is known once all have been tuned and trained, and again after Baleen's shorter run."""
    base = load_recipe(args.recipe)
    train = base.train
    prepared = prepare(
        base.data, vocab_size=base.model.vocab_size, seq_len=train.seq_len, seed=train.seed, cache_dir=args.cache
    )
    race = Race(base, prepared, args.rows)
    ours = Contestant("baleen", train.optimizer, train.lr, dense=False)
    peers = [Contestant(f"dense {name}", name, args.dense_lr, dense=True) for name in ("adamw", "muon")]
    grids, best = {}, []
    for who in (ours, *peers):
        print(f"{who.name}: tuning, {args.grid_minutes:g} minutes each", file=sys.stderr)
        grids[who.name] = race.tuned(who, args.grid_minutes)
        best.append(Entry(who, lr=grids[who.name][0]["lr"], size=grids[who.name][0]["size"]))
    rows = race.run(best, minutes=args.minutes, scores=SCORES)
    finals = {row["name"]: row for row in rows}
    yield told(finals, {}, grids)
    (shorter,) = race.run(best[:1], minutes=args.minutes / 2, scores=SCORES)
    yield told(finals, {"baleen, half the time": shorter}, grids)


def told(finals: dict[str, Row], others: dict[str, Row], grids: dict[str, list[Row]]) -> dict[str, Any]:
    """{baleen, peers, ratios, reached_after_seconds, grids, machine, date}"""
    bits = {name: row["bits_per_byte"] for name, row in (finals | others).items()}
    peers = {name: row for name, row in finals.items() if name != "baleen"}
    return {
        "baleen": finals["baleen"],
        "peers": peers | others,
        "ratios": {
            f"bits per byte: {a} / {b}": bits[a] / bits[b] for a in bits for b in bits if "baleen" in a and "dense" in b
        },
        "reached_after_seconds": {name: first_reached(finals["baleen"]["curve"], bits[name]) for name in peers},
        "grids": grids,
        "machine": machine(),
        "date": max(row["date"] for row in finals.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(HERE / "quality.toml"))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--grid-minutes", type=float, default=3.0)
    parser.add_argument("--dense-lr", type=float, default=2.4e-3, help="middle of the dense models' grids")
    parser.add_argument("--rows", type=Path, default=Path("runs/bench-quality.json"), help="the runs that are done")
    parser.add_argument("--cache", type=Path, default=Path("runs/bench-data"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    result: dict[str, Any] = {}
    for result in measured(args):
        if vars(args) == vars(parser.parse_args([])) | {"json": args.json}:
            RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
        return
    for name, row in {"baleen": result["baleen"], **result["peers"]}.items():
        print(
            f"{name:26} {row['bits_per_byte']:.4f} bits per byte {row['tokens']:10,} tokens {row['seconds']:5.0f} s"
            f" {row['parameters'] / 1e6:.1f}M parameters, lr {row['lr']:.2e}"
        )
        print("  " + " ".join(f"{point['seconds']:.0f}s:{point['bits_per_byte']:.3f}" for point in row["curve"]))
    for name, ratio in result["ratios"].items():
        print(f"{name:60} {ratio:6.3f}")
    for name, seconds in result["reached_after_seconds"].items():
        print(f"baleen reaches {name} after {'-' if seconds is None else f'{seconds:.0f} s'}")


if __name__ == "__main__":
    main()
