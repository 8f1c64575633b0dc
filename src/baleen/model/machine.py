"""What the machine under a network can do."""

from __future__ import annotations

import torch


def device() -> torch.device:
    """Where models are trained and run: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def counted_devices() -> tuple[str, int]:
    """(name, number) of the devices of a process, as the ledger counts them: a GPU, or the threads of the CPU."""
    if device().type == "cuda":
        return torch.cuda.get_device_name(), 1
    return "cpu", torch.get_num_threads()


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 matmul is faster than fp32 there: on NVIDIA's GPUs of compute capability 8.0 and more (older ones
    emulate it), other GPUs, and CPUs with AMX or AVX512-BF16 (elsewhere 10 x slower)."""
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def groups_without_waiting(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `F.grouped_mm` there finds the groups' ends on the GPU; otherwise it copies them to the CPU first.

    Source: torch 2.13, whose kernel takes bf16 on NVIDIA's compute capabilities 9 and 10; its fallback reads `offs`.
    """
    if device.type != "cuda" or torch.version.hip is not None or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def multiplies_fp8_tiles(device: torch.device) -> bool:
    """Whether tensor cores there take a scale for every 128 numbers of a row.

    Source: what `F.scaled_mm` accepts as BlockWise1x128 (torch 2.13): NVIDIA's compute capability 9.0, CUDA 12.9.
    """
    cuda = torch.version.cuda  # None without, and with AMD's
    if device.type != "cuda" or cuda is None or tuple(map(int, cuda.split(".")[:2])) < (12, 9):
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)
