"""Measures what a training step is made of on this machine, attention by PyTorch's.

`python -m baleen.train.operators SECONDS` prints JSON. Nothing imports it; `baleen.cost.calibrate` starts it.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from baleen.model.linear import input_gradients, products, weight_gradients

ROWS, WIDTHS = (64, 256, 1024, 2048), ((128, 512), (256, 256), (512, 1024), (1024, 384))  # of a product: m; k, n
COLD_NUMBERS = 8 * 1024 * 1024  # weights of one shape taken in turn: more than the caches hold
STREAM_NUMBERS = 32 * 1024 * 1024  # FP32, far beyond the caches
ATTENTION = ((8, 4, 256, 64), (2, 8, 512, 64))  # sequences, heads, tokens, head size


def measure(seconds: float) -> dict[str, Any]:
    """Seconds of matrix products by precision, [m, n, k, seconds]; attention in FLOP/s; bandwidth in bytes/s.

    Products are those of a linear layer's forward and both gradients. Each figure is a median; all take `seconds`.
    """
    torch.manual_seed(0)
    share = seconds / (2 * 3 * len(ROWS) * len(WIDTHS) + 16)
    found: dict[str, list[tuple[int, int, int, float]]] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found[name] = []
        for m, (k, n) in itertools.product(ROWS, WIDTHS):
            copies = max(1, COLD_NUMBERS // (k * n))
            x, g = torch.randn(m, k, dtype=dtype), torch.randn(m, n, dtype=dtype)
            weights = itertools.cycle(torch.randn(copies, n, k, dtype=dtype))
            grads = itertools.cycle(torch.empty(copies, n, k, dtype=dtype))
            for (rows, outer, inner), run in (
                ((m, n, k), lambda x=x, w=weights, m=m: products(x, next(w), [m])),
                ((m, k, n), lambda g=g, w=weights, x=x, m=m: input_gradients(g, next(w), [m], torch.empty_like(x))),
                ((n, k, m), lambda g=g, x=x, out=grads, m=m: weight_gradients(g, x, [m], next(out))),
            ):
                found[name].append((rows, outer, inner, _median_seconds(run, share)))
    source, target = torch.randn(STREAM_NUMBERS), torch.empty(STREAM_NUMBERS)
    stream = _median_seconds(lambda: torch.mul(source, 2.0, out=target), 4 * share)
    forward, backward = zip(*(_attention(*shape, budget=6 * share) for shape in ATTENTION), strict=True)
    return {
        "products": found,
        "bandwidth": 2 * 4 * STREAM_NUMBERS / stream,
        "attention_flops": [statistics.mean(forward), statistics.mean(backward)],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _attention(batch: int, heads: int, tokens: int, width: int, budget: float) -> tuple[float, float]:
    """FLOP/s of causal attention's core in FP32, forward and backward (counted as 1 and 2.5 forwards)."""
    q, k, v = (torch.randn(batch, heads, tokens, width, requires_grad=True) for _ in range(3))
    flops = 2 * batch * heads * tokens * tokens * width
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    gradient = torch.ones_like(out)

    def backward() -> None:
        torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)

    with torch.no_grad():
        forward = _median_seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), budget / 3)
    return flops / forward, 2.5 * flops / _median_seconds(backward, budget * 2 / 3)


def _median_seconds(run: Callable[[], object], budget: float) -> float:
    run()
    times, end = [], time.perf_counter() + budget
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    print(json.dumps(measure(float(sys.argv[1]))))
