"""Measures this machine; run as `python -m baleen.cost.calibrate_worker`, prints one JSON object.

The only file of this room that imports torch, inside its functions, and nothing imports it: `baleen.cost.calibrate`
starts it as a process.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

SHAPES = ((256, 256, 256), (1024, 512, 512), (2048, 1024, 1024), (4096, 2048, 2048))  # m, k, n
STREAM_NUMBERS = 32 * 1024 * 1024  # FP32, far beyond the caches
SMALL_NUMBERS = 16


def measure(seconds: float) -> dict[str, Any]:
    """Rates in FLOP/s and bytes/s, overhead in seconds; each the median of runs that fill `seconds` together."""
    import torch

    torch.manual_seed(0)
    share = seconds / (2 * len(SHAPES) + 2)
    rates: dict[str, dict[str, float]] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rates[name] = {}
        for m, k, n in SHAPES:
            a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
            rates[name][f"{m}x{k}x{n}"] = 2 * m * k * n / _median_seconds(lambda a=a, b=b: a @ b, share)
    source, target = torch.randn(STREAM_NUMBERS), torch.empty(STREAM_NUMBERS)
    stream = _median_seconds(lambda: torch.mul(source, 2.0, out=target), share)
    small = torch.randn(SMALL_NUMBERS, requires_grad=True)
    return {
        "matmul_flops": rates,
        "bandwidth": 2 * 4 * STREAM_NUMBERS / stream,
        "op_overhead_seconds": _median_seconds(lambda: small * 2.0, share),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


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
