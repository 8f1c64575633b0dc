"""Quality for the same tokens and for the same seconds: the demo's model beside a dense one of equal active size.

    python bench/quality.py [--minutes 8] [--grid-minutes 2] [--json]

Each learning rate is tuned in short runs, going on until the best one has a worse neighbour on either side. Then
Baleen (MTP and all) trains for --minutes, the dense model for as many seconds, and again for as many tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dense import Dense, DenseTrainer, active_parameters

from baleen.config import Recipe, load_recipe
from baleen.data.loader import Loader
from baleen.data.prepare import Prepared, prepare
from baleen.eval.bits_per_byte import bits_per_byte
from baleen.model.transformer import Transformer
from baleen.train.precision import keep_freed_memory
from baleen.train.trainer import Trainer

CURVE_POINTS = 16
RATIO = 2.0  # between neighbours of a grid of learning rates
MANY_TOKENS = 10**9


def baleen(recipe: Recipe, prepared: Prepared) -> tuple[Any, Trainer]:
    model = Transformer(recipe.model)
    model.init_weights(recipe.train.seed)
    return model, Trainer(recipe, model, Loader(prepared.train, seed=recipe.train.seed))


def dense(recipe: Recipe, prepared: Prepared) -> tuple[Any, DenseTrainer]:
    with torch.device("meta"):
        active = active_parameters(Transformer(recipe.model))
    model = Dense(recipe, active)
    return model, DenseTrainer(recipe, model, Loader(prepared.train, seed=recipe.train.seed))


def run(build: Callable[[Recipe, Prepared], Any], prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    """Train to the recipe's tokens or minutes: {lr, bits_per_byte, tokens, seconds, tokens_per_second, curve}."""
    model, trainer = build(recipe, prepared)
    points: list[tuple[int, float, float]] = []
    started = time.monotonic()
    while not trainer.done:
        result = trainer.step()
        loss = result if isinstance(result, float) else result.loss
        trainer.counters.wall_seconds = time.monotonic() - started
        points.append((trainer.counters.tokens, trainer.counters.wall_seconds, loss))
    bpb = bits_per_byte(model, prepared.tokenizer, prepared.heldout, window=recipe.train.seq_len)["bits_per_byte"]
    counters = trainer.counters
    out = {
        "lr": recipe.train.lr,
        "bits_per_byte": bpb,
        "tokens": counters.tokens,
        "seconds": counters.wall_seconds,
        "tokens_per_second": counters.tokens / counters.wall_seconds,
        "curve": smooth(points),
    }
    print(f"  {build.__name__:7} lr {out['lr']:.2e}  {counters.tokens:9,} tokens  {out['seconds']:4.0f} s  "
          f"{out['tokens_per_second']:5,.0f} tok/s  {bpb:.4f} bits per byte", file=sys.stderr)  # fmt: skip
    return out


def smooth(points: list[tuple[int, float, float]]) -> list[dict[str, float]]:
    """Training loss averaged over CURVE_POINTS stretches of the run."""
    size = max(1, len(points) // CURVE_POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [{"tokens": p[-1][0], "seconds": p[-1][1], "loss": sum(x[2] for x in p) / len(p)} for p in parts]


def tuned(build: Callable[[Recipe, Prepared], Any], prepared: Prepared, recipe: Recipe, minutes: float) -> list[dict]:
    """Short runs on a grid of learning rates, extended until the best one is interior; sorted by learning rate."""
    results = {f: run(build, prepared, changed(recipe, minutes, lr=recipe.train.lr * RATIO**f)) for f in (-1, 0, 1)}
    while True:
        best = min(results, key=lambda f: results[f]["bits_per_byte"])
        missing = [f for f in (best - 1, best + 1) if f not in results]
        if not missing:
            return [results[f] for f in sorted(results)]
        for f in missing:
            results[f] = run(build, prepared, changed(recipe, minutes, lr=recipe.train.lr * RATIO**f))


def changed(recipe: Recipe, minutes: float, *, lr: float, tokens: int = MANY_TOKENS) -> Recipe:
    train = recipe.train.model_copy(update={"minutes": minutes, "lr": lr, "tokens": tokens})
    return recipe.model_copy(update={"train": train})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="chitchat")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--grid-minutes", type=float, default=2.0)
    parser.add_argument("--dense-lr", type=float, default=1.2e-3, help="middle of the dense model's grid")
    parser.add_argument("--cache", type=Path, default=Path("runs/bench-data"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    keep_freed_memory()
    prepared = prepare(
        recipe.data,
        vocab_size=recipe.model.vocab_size,
        seq_len=recipe.train.seq_len,
        seed=recipe.train.seed,
        cache_dir=args.cache,
    )
    recipes = {"baleen": recipe, "dense": changed(recipe, args.minutes, lr=args.dense_lr)}
    grids, best = {}, {}
    for build in (baleen, dense):
        name = build.__name__
        print(f"{name}: learning rates, {args.grid_minutes:g} minutes each", file=sys.stderr)
        grids[name] = tuned(build, prepared, recipes[name], args.grid_minutes)
        best[name] = min(grids[name], key=lambda result: result["bits_per_byte"])["lr"]
    print(f"{args.minutes:g} minutes each, then the dense model on Baleen's tokens", file=sys.stderr)
    ours = run(baleen, prepared, changed(recipe, args.minutes, lr=best["baleen"]))
    same_seconds = run(dense, prepared, changed(recipe, args.minutes, lr=best["dense"]))
    same_tokens = run(dense, prepared, changed(recipe, 0.0, lr=best["dense"], tokens=ours["tokens"]))
    result = {
        "baleen": ours,
        "peers": {"dense, equal seconds": same_seconds, "dense, equal tokens": same_tokens},
        "ratios": {
            "bits_per_byte at equal seconds": ours["bits_per_byte"] / same_seconds["bits_per_byte"],
            "bits_per_byte at equal tokens": ours["bits_per_byte"] / same_tokens["bits_per_byte"],
        },
        "grids": grids,
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
    }
    if args.json:
        print(json.dumps(result))
        return
    for name, out in {"baleen": ours, **result["peers"]}.items():
        print(f"\n{name}: {out['bits_per_byte']:.4f} bits per byte\n   tokens   seconds   training loss")
        for point in out["curve"]:
            print(f"{point['tokens']:9,} {point['seconds']:9.0f} {point['loss']:15.3f}")


if __name__ == "__main__":
    main()
