"""The matmuls of experts by the native kernels beside PyTorch's: GFLOP/s.

    python bench/matmul.py [--precision fp32|bf16] [--rounds 9] [--json]

2,048 tokens through the experts of configs S and M: forward, gradient of inputs, gradient of weights of all groups in
one call, beside a loop of torch.mm over the groups and one torch.mm of all rows by one matrix (gemm). All take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from contenders import machine, network
from rounds import in_turns
from torch import Tensor

from baleen.model.linear import input_gradients, products, weight_gradients
from baleen.model.native.training import kernels, multiplies

TOKENS = 2048
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def contenders(x_MI: Tensor, weight_EOI: Tensor, grad_MO: Tensor, counts: list[int]) -> dict[str, Callable[[], Tensor]]:
    """{"work, who": what is timed}; the loop and gemm write into outputs that are there."""
    out, grad_x, grad_w = torch.empty_like(grad_MO), torch.empty_like(x_MI), torch.empty_like(weight_EOI)
    xs, grads, w = x_MI.split(counts), grad_MO.split(counts), weight_EOI[0]

    def loop(into: Tensor, ys: tuple[Tensor, ...] | Tensor, lefts: tuple[Tensor, ...], rights: Any) -> Tensor:
        for y, left, right in zip(ys, lefts, rights, strict=True):
            torch.mm(left, right, out=y)
        return into

    turned = tuple(grad.t() for grad in grads)
    return {
        "forward, native": lambda: products(x_MI, weight_EOI, counts),
        "forward, loop": lambda: loop(out, out.split(counts), xs, weight_EOI.mT),
        "forward, gemm": lambda: torch.mm(x_MI, w.t(), out=out),
        "inputs, native": lambda: input_gradients(grad_MO, weight_EOI, counts, grad_x),
        "inputs, loop": lambda: loop(grad_x, grad_x.split(counts), grads, weight_EOI),
        "inputs, gemm": lambda: torch.mm(grad_MO, w, out=grad_x),
        "weights, native": lambda: weight_gradients(grad_MO, x_MI, counts, grad_w),
        "weights, loop": lambda: loop(grad_w, grad_w, turned, xs),
        "weights, gemm": lambda: torch.mm(grad_MO.t(), x_MI, out=grad_w[0]),
    }


def _require_equal(*runs: Callable[[], Tensor], tolerance: float) -> None:
    """Raises AssertionError where the native product is not the loop's."""
    for native, loop in zip(runs[::3], runs[1::3], strict=True):
        ours, theirs = native().double(), loop().double()  # copies: both write to the same place
        assert (ours - theirs).norm() <= tolerance * theirs.norm(), "the kernels compute something else"


def measure(config: str, rounds: int, dtype: torch.dtype) -> dict[str, float]:
    cfg = network(config).config
    generator = torch.Generator().manual_seed(1)
    of_expert = torch.randint(cfg.n_routed_experts, (TOKENS * cfg.num_experts_per_tok,), generator=generator)
    counts = torch.bincount(of_expert, minlength=cfg.n_routed_experts).tolist()
    seconds: dict[str, list[float]] = {}
    shapes = ((2 * cfg.moe_intermediate_size, cfg.hidden_size), (cfg.hidden_size, cfg.moe_intermediate_size))
    made = []
    for outputs, inputs in shapes:
        sizes = ((len(of_expert), inputs), (len(counts), outputs, inputs), (len(of_expert), outputs))
        x, weight, grad = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
        made.append(contenders(x, weight, grad, counts))
        _require_equal(*made[-1].values(), tolerance=2e-2 if dtype is torch.bfloat16 else 1e-4)
    names = list(made[0])
    for round_ in range(rounds + 1):
        for name in in_turns(names, round_):
            started = time.perf_counter()
            for one in made:
                one[name]()
            if round_:
                seconds.setdefault(name, []).append(time.perf_counter() - started)
    flops = sum(2 * len(of_expert) * outputs * inputs for outputs, inputs in shapes)
    return {name: flops / statistics.median(took) / 1e9 for name, took in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not multiplies(DTYPES[args.precision]):
        parser.error(f"{args.precision} is PyTorch's on this machine: there is nothing to compare")
    found = {config: measure(config, args.rounds, DTYPES[args.precision]) for config in ("S", "M")}
    if args.json:
        print(json.dumps({"gflops": found, "precision": args.precision, "path": kernels(), "machine": machine()}))
        return
    for config, rates in found.items():
        for work in ("forward", "inputs", "weights"):
            who = {name: rates[f"{work}, {name}"] for name in ("native", "loop", "gemm")}
            print(f"{config} {work:8} " + "  ".join(f"{name} {rate:5.0f} GFLOP/s" for name, rate in who.items()))


if __name__ == "__main__":
    main()
