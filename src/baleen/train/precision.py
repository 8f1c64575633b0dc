"""What a machine can multiply fast, and the settings that follow from it."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator
from typing import Literal

import torch

from baleen.model.machine import multiplies_bf16

Precision = Literal["fp32", "bf16", "fp8"]


def resolve_precision(precision: Literal["auto", "fp32", "bf16", "fp8"], device: torch.device) -> Precision:
    """`auto` is bf16 where that is faster, fp32 elsewhere. Weights and optimizer stay fp32."""
    if precision == "auto":
        return "bf16" if multiplies_bf16(device) else "fp32"
    return precision


@contextlib.contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Matmuls in bf16 over fp32 weights (autocast), or everything in fp32.

    With fp8 this is for what `use_fp8` leaves wide: bf16 on GPUs, fp32 on CPUs, where the effect of FP8 stands alone.
    """
    bf16 = precision == "bf16" or (precision == "fp8" and device.type != "cpu")
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        yield


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks instead of returning them to the kernel: page faults of each fresh activation
    cost a CPU training step up to a third of its time. Elsewhere than on Linux with glibc it does nothing."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    # Setting any of the three ends their adjustment by use, and before 2.35 glibc takes no threshold above 32 MB.
    if not any(libc.mallopt(m_mmap_threshold, size) for size in (1 << 30, 1 << 25)):
        return
    libc.mallopt(m_trim_threshold, -1)  # never: an int would hold no more than two gigabytes
    libc.mallopt(m_top_pad, 1 << 28)
