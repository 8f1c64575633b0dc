"""Calling the kernels of training.cpp."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from baleen.model.native.library import load_library

SOURCE = Path(__file__).with_suffix(".cpp")
_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "linear": [_P, _I, _P, _P, _P, _I, _I, _I],
    "linear_dx": [_P, _P, _P, _P, _I, _I, _I],
    "linear_dw": [_P, _P, _I, _P, _P, _I, _I, _I, _I],
    "rms_norm": [_P, _I, _P, _P, _P, _I, _I, _F],
    "rms_norm_backward": [_P, _P, _I, _P, _P, _P, _P, _I, _I],
    "swiglu": [_P, _P, _I, _P, _I, _I],
    "swiglu_backward": [_P, _P, _P, _I, _P, _P, _I, _I, _I],
    "cross_entropy": [_P, _P, _F, _P, _P, _I, _I, _I],
    "sum_rows": [_P, _P, _P, _P, _I, _I, _I],
    "sum_rows_backward": [_P, _P, _P, _P, _P, _P, _I, _I, _I],
    "attention": [*[_P] * 7, *[_I] * 6, _F],
    "attention_backward": [*[_P] * 12, *[_I] * 6, _F],
}


def kernels() -> str:
    """Which kernels run on this machine's CPU: the native library's name, or `pytorch`.

    The name tells source, flags and CPU, and the compiler unless BALEEN_NATIVE_ARCH names the CPU.
    """
    library = load_library(SOURCE)
    return "pytorch" if library is None else Path(library._name).stem


def serves(x: Tensor) -> bool:
    """Native kernels read plain fp32 or bf16 tensors of the CPU: no fake ones, no tracer's."""
    plain = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype in _NAMES
    return plain and x.numel() > 0 and not torch.compiler.is_compiling() and load_library(SOURCE) is not None


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether products of that dtype are native: fp32, and bf16 where the CPU has instructions for it, but not AMX,
    by which PyTorch multiplies faster."""
    library = load_library(SOURCE)
    if library is None or dtype is torch.float32:
        return library is not None
    return dtype is torch.bfloat16 and hasattr(library, "linear_bfloat16") and not torch.cpu._is_amx_tile_supported()


def call(name: str, dtypes: tuple[torch.dtype, ...], *arguments: Tensor | int | float | None) -> None:
    """Run a kernel: tensors pass as pointers, None as a null one, int as int64_t, float as float."""
    kernel = _kernel(name, dtypes)
    kernel(torch.get_num_threads(), *[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


@functools.cache
def _kernel(name: str, dtypes: tuple[torch.dtype, ...]):
    library = load_library(SOURCE)
    assert library is not None, "asked for without serves"
    pointer = ctypes.c_void_p.in_dll(library, "_".join((name, *(_NAMES[dtype] for dtype in dtypes))))
    function = ctypes.CFUNCTYPE(None, ctypes.c_int, *_ARGUMENTS[name])(pointer.value or 0)
    return function
