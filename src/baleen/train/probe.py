"""Seconds and bytes of real training steps on random tokens: `python -m baleen.train.probe < probes.json`.

Reads {"recipes": [{...}, ...], "steps": N} as JSON on stdin and prints a JSON list of measurements. The cost engine
starts it as a process of its own, to learn what a step costs on this machine.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from baleen.data.loader import Loader
from baleen.data.packing import PackedTokens
from baleen.model.transformer import Transformer
from baleen.recipe import Recipe
from baleen.train.precision import keep_freed_memory
from baleen.train.trainer import Trainer

WARM_UP = 4  # steps: the optimizer's state is made, kernels are compiled and caches filled


def time_steps(recipes: list[Recipe], steps: int) -> list[dict[str, Any]]:
    """For each recipe {seconds, update_seconds, precision, parameters, peak_bytes} of training a fresh network.

    seconds: the median of `steps`. update_seconds: likewise, of clipping and the optimizer.
    peak_bytes: what the process grew by; known of the first recipe only, and where the system tells.

    The steps of all take turns, so that a machine whose speed drifts drifts for all alike.
    """
    trainers, peaks = [], []
    for recipe in recipes:
        before = process_bytes("VmRSS")
        model = Transformer(recipe.model)
        model.init_weights(recipe.train.seed)
        trainers.append(Trainer(recipe, model, Loader(_random_tokens(recipe), seed=recipe.train.seed)))
        for _ in range(WARM_UP):
            trainers[-1].step()
        peak = process_bytes("VmHWM")
        # what the first one freed is kept for the next, whose growth would tell too little
        peaks.append(peak - before if before and peak and not peaks else None)
    seconds = [[(trainer.step().seconds, _update_seconds(trainer)) for trainer in trainers] for _ in range(steps)]
    return [
        {
            "seconds": statistics.median(step for step, _ in of_one),
            "update_seconds": statistics.median(update for _, update in of_one),
            "precision": trainer.precision,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "peak_bytes": peak,
        }
        for of_one, trainer, peak in zip(zip(*seconds, strict=True), trainers, peaks, strict=True)
    ]


def _update_seconds(trainer: Trainer) -> float:
    """Of clipping and applying, once more, the gradients that the last step left."""
    started = time.monotonic()
    trainer.worker.clip_gradients(trainer.recipe.train.clip_norm)
    trainer.optimizer.step(trainer.schedules.lr(trainer.position))
    return time.monotonic() - started


def _random_tokens(recipe: Recipe) -> PackedTokens:
    train = recipe.train
    tokens = np.random.default_rng(0).integers(0, recipe.model.vocab_size, train.batch_tokens + 1, dtype=np.int32)
    return PackedTokens(train.seq_len, tokens, np.zeros_like(tokens))


def process_bytes(field: str) -> int | None:
    """VmRSS or VmHWM (its peak) of this process; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next((line for line in status.read_text().splitlines() if line.startswith(field)), None)
    return None if line is None else int(line.split()[1]) * 1024


if __name__ == "__main__":
    keep_freed_memory()
    asked = json.load(sys.stdin)
    print(json.dumps(time_steps([Recipe.model_validate(recipe) for recipe in asked["recipes"]], asked["steps"])))
