"""What the machine under a network can do."""

from __future__ import annotations

import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 matmul is faster than fp32 there: GPUs, and CPUs with AMX or AVX512-BF16 (elsewhere 10 x slower)."""
    return device.type != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
