"""Quality per second: Baleen beside the best dense models, with AdamW and with Muon, on one text.

    python bench/quality.py [--minutes 20] [--grid-minutes 3] [--recipe quality.toml] [--rows FILE] [--json]
    python bench/quality.py --at baleen,-1,4.8e-3 'dense adamw,-2,9.6e-3' 'dense muon,-2,6.8e-3'

Learning rate and size of each are tuned in short runs, each place beside its four neighbours, until the best is a place
that was a middle before. Then each trains for --minutes, and Baleen once more for half of them. With --at they race at
these places (name, size, rate) instead, untuned and without the half: an hour. The dense models are compiled and have
what helps Baleen too: its schedule, its initial weights' size, its embedding's higher rate. Runs that are compared take
turns of a few seconds, each on a clock of its own, which stands still while held-out text is scored or a model is
compiled: a machine that slows down slows all of them. What has been compared is kept in --rows: stopped, the same
command goes on with the next comparison. Four hours on two cores, or more, where a middle of a grid is not its best.
What it finds without an option is kept in bench/results/quality.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from contenders import machine, versions
from dense import Dense, DenseTrainer, active_parameters
from rounds import in_turns

from baleen.config import ModelConfig
from baleen.data.loader import Loader
from baleen.data.prepare import Prepared, prepare
from baleen.eval.bits_per_byte import bits_per_byte
from baleen.model.native.training import kernels
from baleen.model.transformer import Transformer
from baleen.parallel.ranks import fingerprint_of_code
from baleen.recipe import Recipe, load_recipe
from baleen.train.precision import keep_freed_memory
from baleen.train.trainer import Trainer

SCORES = 12  # of held-out text, on the way of a long run
TURN_SECONDS = 5.0
NAMES = ("baleen", "dense adamw", "dense muon")
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
    names = ("hidden_size", "q_lora_rank", "kv_lora_rank", "intermediate_size", "moe_intermediate_size")
    widths = {name: getattr(model, name) for name in names}
    return model.model_copy(update={n: max(1, round(ratio * w / 16)) * 16 for n, w in widths.items() if w is not None})


@dataclass(frozen=True)
class Entry:
    """A contestant at one place of its grid."""

    who: Contestant
    lr: float
    size: int
    minutes: float


class Race:
    """Comparisons, each by its entries and their code; one that has been made before is read from the file."""

    def __init__(self, base: Recipe, prepared: Prepared, path: Path):
        self._base, self._prepared, self._path = base, prepared, path
        self._compared: dict[str, list[Row]] = json.loads(path.read_text()) if path.exists() else {}

    def compare(self, entries: list[Entry], *, scores: int = 1) -> list[Row]:
        """Trains all by turns; a row of each: {bits_per_byte, tokens, seconds, tokens_per_second, curve, ...}."""
        recipes = [e.who.recipe(self._base, lr=e.lr, size=e.size, minutes=e.minutes) for e in entries]
        name = self._name(entries, recipes, scores)
        if name not in self._compared:
            runs = []
            for entry, recipe in zip(entries, recipes, strict=True):
                runs.append(Run(entry.who.trainer(recipe, self._prepared, entry.size), self._prepared, scores))
            turn = 0
            while not all(run.trainer.done for run in runs):
                for run in in_turns(runs, turn):
                    run.go_on(TURN_SECONDS)
                turn += 1
            rows = []
            for entry, run in zip(entries, runs, strict=True):
                place = {"name": entry.who.name, "lr": entry.lr, "size": entry.size}
                rows.append(row := place | run.row() | {"date": datetime.date.today().isoformat()})
                told = f"{row['name']}, size {row['size']:+d}, lr {row['lr']:.2g}, {entry.minutes:g} minutes"
                print(f"  {told}: {row['tokens']:,} tokens, {row['bits_per_byte']:.4f} bits per byte", file=sys.stderr)
            self._compared[name] = rows
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._compared, indent=1) + "\n")
        return self._compared[name]

    def tuned(self, who: Contestant, minutes: float) -> list[Row]:
        """Compares the middle of the grid with its four neighbours and goes on around the best, until that is a middle;
        the rows of the last comparison, the best first. Where two places beat each other by turns, it is the last."""
        step, size = 0, 0
        middles = []
        while True:
            middles.append((step, size))
            places = [(step, size), (step, size - 1), (step, size + 1), (step - 1, size), (step + 1, size)]
            rows = self.compare([Entry(who, who.lr * LR_RATIO ** place[0], place[1], minutes) for place in places])
            best = min(range(len(rows)), key=lambda i: rows[i]["bits_per_byte"])
            if places[best] in middles:
                return [rows[best], *rows[:best], *rows[best + 1 :]]
            step, size = places[best]

    def _name(self, entries: list[Entry], recipes: list[Recipe], scores: int) -> str:
        """Of all that decides the rows: code, recipes, text and machine."""
        digest = blake2b(fingerprint_of_code().encode(), digest_size=8)
        for file in ("dense.py", Path(__file__).name):
            digest.update((HERE / file).read_bytes())
        for entry, recipe in zip(entries, recipes, strict=True):
            digest.update(f"{entry} {recipe.to_toml()}".encode())
        digest.update(json.dumps([scores, self._prepared.stats, machine(), versions()]).encode())
        return f"{' / '.join(dict.fromkeys(entry.who.name for entry in entries))}, {digest.hexdigest()}"


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
            "epochs": self.trainer.loader.epoch,  # of the text that are behind it
            "curve": self._curve,
        }


def place(text: str) -> tuple[str, int, float]:
    """ "dense muon,-2,6.8e-3" -> (name, size, rate). Raises ValueError."""
    name, size, lr = text.split(",")
    if name not in NAMES:
        raise ValueError(name)
    return name, int(size), float(lr)


def first_reached(curve: list[dict[str, float]], bits: float) -> float | None:
    """Seconds of the first score that is as good; None where there is none."""
    return next((point["seconds"] for point in curve if point["bits_per_byte"] <= bits), None)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """What all have reached, each at the best place of its grid."""
    base = load_recipe(args.recipe)
    train = base.train
    prepared = prepare(
        base.data, vocab_size=base.model.vocab_size, seq_len=train.seq_len, seed=train.seed, cache_dir=args.cache
    )
    race = Race(base, prepared, args.rows)
    ours = Contestant("baleen", train.optimizer, train.lr, dense=False)
    peers = [Contestant(f"dense {name}", name, args.dense_lr, dense=True) for name in ("adamw", "muon")]
    if args.at:
        named = dict(zip(NAMES, (ours, *peers), strict=True))
        entries = [Entry(named[name], lr, size, args.minutes) for name, size, lr in args.at]
        return told({label(row): row for row in race.compare(entries, scores=SCORES)}, {})
    grids, best = {}, []
    for who in (ours, *peers):
        print(f"{who.name}: tuning, {args.grid_minutes:g} minutes each", file=sys.stderr)
        grids[who.name] = race.tuned(who, args.grid_minutes)
        middle = grids[who.name][0]
        best.append(Entry(who, middle["lr"], middle["size"], args.minutes))
    shorter = replace(best[0], minutes=args.minutes / 2)
    *finals, half = race.compare([*best, shorter], scores=SCORES)
    return told({row["name"]: row for row in finals} | {"baleen, half the time": half}, grids)


def label(row: Row) -> str:
    """As --at is typed, so that a contestant can race at several places."""
    return f"{row['name']},{row['size']},{row['lr']:g}"


def told(finals: dict[str, Row], grids: dict[str, list[Row]]) -> dict[str, Any]:
    """{baleen, peers, ratios, reached_after_seconds, grids, machine, date}, of rows by their labels."""
    ours = {name: row for name, row in finals.items() if row["name"] == "baleen"}
    peers = {name: row for name, row in finals.items() if name not in ours}
    pairs = [(a, b) for a in ours for b in peers]
    return {
        "baleen": ours,
        "peers": peers,
        "ratios": {f"bits per byte: {a} / {b}": ours[a]["bits_per_byte"] / peers[b]["bits_per_byte"] for a, b in pairs},
        "reached_after_seconds": {
            f"{a} reaches {b}": first_reached(ours[a]["curve"], peers[b]["bits_per_byte"]) for a, b in pairs
        },
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
    parser.add_argument("--at", nargs="+", default=[], type=place, metavar="NAME,SIZE,LR", help="no grids: race here")
    parser.add_argument("--rows", type=Path, default=Path("runs/bench-quality.json"), help="the runs that are done")
    parser.add_argument("--cache", type=Path, default=Path("runs/bench-data"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    torch._dynamo.config.recompile_limit = 64  # dense models of many sizes share one compiled function
    print(f"baleen's kernels: {kernels()}", file=sys.stderr)  # compiled now, on no clock
    result = measured(args)
    if vars(args) == vars(parser.parse_args([])) | {"json": args.json}:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
        return
    for name, row in (result["baleen"] | result["peers"]).items():
        print(
            f"{name:26} {row['bits_per_byte']:.4f} bits per byte {row['tokens']:10,} tokens {row['seconds']:5.0f} s"
            f" {row['parameters'] / 1e6:.1f}M parameters, lr {row['lr']:.2e}, epochs {row['epochs']}"
        )
        print("  " + " ".join(f"{point['seconds']:.0f}s:{point['bits_per_byte']:.3f}" for point in row["curve"]))
    for name, ratio in result["ratios"].items():
        print(f"{name:60} {ratio:6.3f}")
    for name, seconds in result["reached_after_seconds"].items():
        print(f"{name} after {'-' if seconds is None else f'{seconds:.0f} s'}")


if __name__ == "__main__":
    main()
