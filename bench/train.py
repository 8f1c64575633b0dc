"""A training step beside transformers' and beside a dense model of equal active size: tokens a second.

    python bench/train.py --config S|M|L [--precision fp32|bf16] [--json | --profile]

Batches of 8 x 256 tokens, fused AdamW. All take turns in one process; medians of the rounds. First the loss and every
gradient of those that share their weights at the start, Baleen and transformers, are compared. "baleen compiled" has
its layers compiled by Inductor, matmuls too where they are no experts'; these and attention stay native.
--profile shows where a step of ours goes instead.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from contenders import machine, network, versions
from rounds import in_turns, ratio, some_of
from torch import Tensor, nn

from baleen.config import model_config_to_hf
from baleen.model.moe import DeepseekMoE
from baleen.model.native.training import kernels
from baleen.model.sdpa import Attention
from baleen.model.transformer import Transformer
from baleen.recipe import Recipe
from baleen.train.loss import training_loss
from baleen.train.precision import Precision, computing_in, keep_freed_memory

BATCH, LENGTH = 8, 256
TOLERANCE = {"fp32": 1e-3, "bf16": 0.5}  # of a gradient; strangers are 1.4 apart
CPU = torch.device("cpu")


class Contender:
    """A model, its loss and its optimizer; `seconds` holds the optimizer's share of each step apart."""

    def __init__(self, name: str, model: nn.Module, loss: Callable[[Tensor], Tensor], precision: Precision):
        self.name, self.model, self._loss, self._precision = name, model, loss, precision
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.first_seconds: float | None = None  # of the first forward and backward: what is compiled, is in it
        self.steps: list[float] = []
        self.optimizer_steps: list[float] = []

    def gradients(self, ids: Tensor) -> dict[str, Tensor]:
        """The loss of one batch, and every parameter's gradient by its name; no update."""
        self.model.zero_grad(set_to_none=True)
        loss = torch.tensor(self._backward(ids))
        return {"loss": loss} | {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def step(self, ids: Tensor) -> None:
        started = time.perf_counter()
        self.model.zero_grad(set_to_none=True)
        self._backward(ids)
        before = time.perf_counter()
        self._optimizer.step()
        self.optimizer_steps.append(time.perf_counter() - before)
        self.steps.append(time.perf_counter() - started)

    def _backward(self, ids: Tensor) -> float:
        started = time.perf_counter()
        with computing_in(self._precision, CPU):
            loss = self._loss(ids)
        loss.backward()
        if self.first_seconds is None:
            self.first_seconds = time.perf_counter() - started
        return loss.item()


def contenders(config: str, precision: Precision, peers: list[str]) -> dict[str, Contender]:
    from dense import Dense, active_parameters  # here, so that Contender can be had without transformers
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model = network(config).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    active = active_parameters(model)
    made = {"baleen": Contender("baleen", model, _own(model), precision)}
    if "baleen compiled" in peers:
        twin = network(config).train()
        for module in twin.modules():
            if isinstance(module, DeepseekMoE):
                module.dispatch = torch.compiler.disable(module.dispatch)
            elif isinstance(module, Attention):
                module.forward = torch.compiler.disable(module.forward)
        for layer in twin.trunk_layers:
            layer.compile()
        made["baleen compiled"] = Contender("baleen compiled", twin, _own(twin), precision)
    for name, experts in (("transformers grouped_mm", "grouped_mm"), ("transformers eager", "eager")):
        if name in peers:
            hf_config = DeepseekV3Config(**model_config_to_hf(model.config), experts_implementation=experts)
            peer = DeepseekV3ForCausalLM(hf_config).train()
            peer.load_state_dict(weights)
            made[name] = Contender(name, peer, _causal(peer), precision)
    train = {"tokens": 1, "batch_tokens": LENGTH, "seq_len": LENGTH, "lr": 1e-4}
    recipe = Recipe.model_validate({"model": model.config.model_dump(), "train": train})
    for name in ("dense", "dense compiled"):
        if name in peers:
            dense = Dense(recipe, active).llama.train()
            loss = torch.compile(_causal(dense)) if name == "dense compiled" else _causal(dense)
            made[name] = Contender(name, dense, loss, precision)
    return made


def _own(model: Transformer) -> Callable[[Tensor], Tensor]:
    return lambda ids: training_loss(model, ids, mtp_loss_weight=0.0, balance_loss_weight=0.0).total


def _causal(model: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    def loss(ids: Tensor) -> Tensor:
        logits = model(ids[:, :-1], use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return loss


def check(made: dict[str, Contender], ids: Tensor, precision: Precision) -> dict[str, float]:
    """Largest difference of the loss and of a parameter's gradient, over its norm; an error if a peer of the same
    weights computes something else."""
    pairs = [("baleen", name) for name in made if name.startswith(("transformers", "baleen "))]
    pairs += [("dense", "dense compiled")] if {"dense", "dense compiled"} <= made.keys() else []
    found = {}
    for one, other in pairs:
        ours, theirs = made[one].gradients(ids), made[other].gradients(ids)
        assert theirs.keys() == ours.keys(), f"{other} has other parameters"
        apart = {key: float((theirs[key] - ours[key]).norm() / ours[key].norm()) for key in ours}
        worst = max(apart, key=lambda key: math.inf if math.isnan(apart[key]) else apart[key])
        found[other] = apart[worst]
        if not found[other] <= TOLERANCE[precision]:
            raise SystemExit(f"{other} computes something else than {one}: {worst} differs by {found[other]:.2g}")
    return found


def measure(args: argparse.Namespace) -> dict:
    keep_freed_memory()
    made = contenders(args.config, args.precision, args.peers)
    vocab = next(iter(made.values())).model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(vocab, (args.rounds + 2, BATCH, LENGTH + 1), generator=generator)
    differences = check(made, batches[0], args.precision)
    for round_, ids in enumerate(batches):
        for name in in_turns(list(made), round_):
            made[name].step(ids)
    rows = {}
    for name, contender in made.items():
        steps, updates = contender.steps[2:], contender.optimizer_steps[2:]
        median = statistics.median(steps)
        rows[name] = {
            "tokens_per_second": BATCH * LENGTH / median,
            "spread": (max(steps) - min(steps)) / median,
            "rounds": [BATCH * LENGTH / step for step in steps],
            "optimizer_share": statistics.median(updates) / median,
            "first_step_seconds": contender.first_seconds,
        } | ({"differs_by": differences[name]} if name in differences else {})
    return {
        "config": args.config,
        "precision": args.precision,
        "baleen": rows["baleen"] | {"path": "pytorch" if kernels() == "pytorch" else "native"},
        "peers": {name: row for name, row in rows.items() if name != "baleen"},
        "ratios": {f"baleen / {name}": ratio(rows["baleen"], row) for name, row in rows.items() if name != "baleen"},
        "machine": machine(),
        "versions": versions(),
    }


def profiled(config: str, precision: Precision) -> str:
    """Where four steps go, by the time that PyTorch's operators and our own functions take themselves."""
    keep_freed_memory()
    model = network(config).train()
    contender = Contender("baleen", model, _own(model), precision)
    ids = torch.randint(model.config.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    for _ in range(3):  # until freed memory is kept
        contender.step(ids)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(4):
            contender.step(ids)
    return profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=("S", "M", "L"), default="S")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    peers = ["transformers grouped_mm", "transformers eager", "dense", "dense compiled", "baleen compiled"]
    parser.add_argument("--peers", type=some_of(*peers), default=peers)
    parser.add_argument("--rounds", type=int, default=7)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true")
    shown.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if args.profile:
        print(profiled(args.config, args.precision))
        return
    print(f"train, config {args.config}, {args.precision}", file=sys.stderr)
    result = measure(args)
    if args.json:
        print(json.dumps(result))
        return
    for name, row in {"baleen": result["baleen"], **result["peers"]}.items():
        print(
            f"{name:24} {row['tokens_per_second']:9,.0f} tokens/s  spread {row['spread']:4.0%}"
            f"  optimizer {row['optimizer_share']:4.0%}  first step {row['first_step_seconds']:5.1f} s"
            f"  {row.get('path', '')}"
        )
    for name, times in result["ratios"].items():
        print(f"{name:36} {times:6.2f}")


if __name__ == "__main__":
    main()
