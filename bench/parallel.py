"""Two processes of one thread: expert parallel beside data parallel, tokens a second of whole training steps.

    torchrun --nproc-per-node 2 bench/parallel.py --config S|M [--rounds N] [--zero 0|1] [--json]

Batches of 16 x 256 tokens, half of them on each rank, over gloo. Both take turns in the same processes; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics

import numpy as np
import torch
from contenders import machine, network
from rounds import in_turns, ratio

from baleen.data.loader import Loader
from baleen.data.packing import PackedTokens
from baleen.parallel.mesh import make_grid
from baleen.parallel.ranks import Ranks, joined
from baleen.parallel.team import join
from baleen.recipe import Recipe
from baleen.train.precision import keep_freed_memory
from baleen.train.trainer import Trainer

SEQUENCES, LENGTH, WARM_UP = 16, 256, 2
LAYOUTS = {"DP2": 1, "EP2": 2}  # ranks that share the experts


def trainer(config: str, zero: int, expert: int, world: int) -> Trainer:
    model = network(config).train()
    recipe = Recipe.model_validate(
        {
            "model": model.config.model_dump(),
            "train": {
                "tokens": 1e9, "batch_tokens": SEQUENCES * LENGTH, "seq_len": LENGTH, "lr": 1e-4, "precision": "fp32",
                "ema_decay": 0.0,
            },
            "parallel": {"expert": expert, "zero": zero},
        }
    )  # fmt: skip
    worker = join(model, recipe.parallel, make_grid(recipe.parallel, recipe.model, world))
    tokens = np.random.default_rng(0).integers(0, recipe.model.vocab_size, SEQUENCES * LENGTH + 1, dtype=np.int32)
    packed = PackedTokens(LENGTH, tokens, np.zeros_like(tokens))
    return Trainer(recipe, worker, Loader(packed, seed=0, rank=worker.data_rank, world_size=worker.data_ranks))


def measure(args: argparse.Namespace, ranks: Ranks) -> dict[str, object]:
    trainers = {name: trainer(args.config, args.zero, expert, ranks.world) for name, expert in LAYOUTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for round in range(WARM_UP + args.rounds):
        for name in in_turns(list(trainers), round):
            (took,) = ranks.largest([trainers[name].step().seconds])
            if round >= WARM_UP:
                seconds[name].append(took)
    rows = {
        name: {
            "tokens_per_second": SEQUENCES * LENGTH / statistics.median(steps),
            "spread": (max(steps) - min(steps)) / statistics.median(steps),
            "rounds": [SEQUENCES * LENGTH / step for step in steps],
        }
        for name, steps in seconds.items()
    }
    return {
        "config": args.config,
        "baleen": rows["EP2"],
        "peers": {"DP2": rows["DP2"]},
        "ratios": {"EP2 / DP2": ratio(rows["EP2"], rows["DP2"])},
        "machine": machine() | {"processes": ranks.world},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=("S", "M"), default="S")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--zero", type=int, choices=(0, 1), default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if os.environ.get("WORLD_SIZE") != "2":
        parser.error("start it with `torchrun --nproc-per-node 2`")
    torch.set_num_threads(1)
    keep_freed_memory()
    with joined(600) as ranks:
        result = measure(args, ranks)
        if ranks.rank:
            return
        if args.json:
            print(json.dumps(result), flush=True)
            return
        for name, row in {"EP2": result["baleen"], **result["peers"]}.items():  # type: ignore[dict-item]
            print(f"{name} {row['tokens_per_second']:9,.0f} tokens/s  spread {row['spread']:4.0%}")
        print(f"EP2 / DP2 {result['ratios']['EP2 / DP2']:.2f}", flush=True)  # type: ignore[index]


if __name__ == "__main__":
    main()
