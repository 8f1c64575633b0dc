"""The C interface of step.cpp: its structs, field by field, and its functions."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from baleen.model.native.library import load_library

SOURCE = Path(__file__).parent / "step.cpp"


class Matrix(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("bias", c_void_p), ("inputs", c_int32), ("outputs", c_int32),
                ("format", c_int32), ("reserved", c_int32)]  # fmt: skip


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in (
            "hidden", "vocab", "trunk_layers", "layers", "heads", "q_rank", "rank", "nope", "rope", "value",
            "experts", "top_k", "groups", "top_groups", "expert_width", "normalise_gates", "interleave",
        )),
        *((name, c_float) for name in ("gate_scale", "softmax_scale", "norm_eps", "latent_norm_eps")),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "latent_norm")),
        *((name, Matrix) for name in ("qkv_a", "q_b", "w_uk", "w_uv", "o", "router")),
        ("correction", c_void_p),
        *((name, Matrix) for name in ("shared_gate_up", "shared_down", "gate_up", "down")),
        *((name, c_void_p) for name in ("embed_norm", "hidden_norm", "head_norm")),
        ("join", Matrix),
    ]


class Model(ctypes.Structure):
    _fields_ = [("shape", Shape), ("layers", c_void_p), ("embedding", c_void_p), ("norm", c_void_p), ("head", Matrix),
                ("cos", c_void_p), ("sin", c_void_p)]  # fmt: skip


class Step(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("tokens", "sequences", "outputs", "threads", "mtp_depth", "page_size")),
        *((name, c_void_p) for name in ("ids", "starts", "counts", "tables", "table_at")),
        ("layer_step", c_int64),
        *((name, c_void_p) for name in ("pages", "hidden_in", "hidden", "logits", "routes")),
    ]


class Library:
    """step.cpp, compiled and loaded."""

    def __init__(self, dll: ctypes.CDLL):
        dll.baleen_matrix_bytes.restype = c_int64
        dll.baleen_pack.argtypes = [c_void_p, c_void_p, c_int32, c_int32, c_int32, c_void_p, c_int32]
        dll.baleen_advise.argtypes = [c_void_p, c_int64]
        dll.baleen_open.restype, dll.baleen_open.argtypes = c_void_p, [c_void_p]
        dll.baleen_step.argtypes = [c_void_p, c_void_p]
        dll.baleen_close.argtypes = [c_void_p]
        dll.baleen_draw.argtypes = [c_void_p, c_int64, c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_int32]
        for i, struct in enumerate((Model, Layer, Step)):
            assert dll.baleen_size(i) == ctypes.sizeof(struct), f"{struct.__name__} differs from step.h"
        self._dll = dll
        self.step, self.close = dll.baleen_step, dll.baleen_close

    def open(self, model: Model) -> int:
        """A forward of this model, which keeps its buffers from step to step."""
        return self._dll.baleen_open(ctypes.byref(model))

    def draw(self, logits_RZ: Tensor, temperatures_R: Tensor, keys_R2: Tensor) -> Tensor:
        """Tokens int64 [R] by `sampler.gumbel`; logits float32 with rows in one piece each, keys int32 [R, 2]."""
        R, Z = logits_RZ.shape
        assert logits_RZ.dtype == torch.float32 and logits_RZ.stride(1) == 1 and keys_R2.is_contiguous()
        tokens_R = torch.empty(R, dtype=torch.long)
        self._dll.baleen_draw(logits_RZ.data_ptr(), logits_RZ.stride(0), R, Z, temperatures_R.data_ptr(),
                              keys_R2.data_ptr(), tokens_R.data_ptr(), torch.get_num_threads())  # fmt: skip
        return tokens_R

    def matrix_bytes(self, inputs: int, outputs: int, format: int) -> int:
        return self._dll.baleen_matrix_bytes(inputs, outputs, format)

    def advise_huge_pages(self, memory: Tensor) -> None:
        """Before it is first written to: fewer misses of the TLB while weights stream by."""
        self._dll.baleen_advise(memory.data_ptr(), memory.numel())

    def pack(self, source_OI: Tensor, rows: Tensor, format: int, data: Tensor) -> None:
        """Row rows[i] of `source_OI`, or zeros where that is negative, becomes output i of a packed matrix."""
        self._dll.baleen_pack(source_OI.data_ptr(), rows.data_ptr(), source_OI.shape[1], len(rows), format,
                              data.data_ptr(), torch.get_num_threads())  # fmt: skip


@cache
def native_library() -> Library | None:
    """None where native code is off, or does not compile and is not required (BALEEN_NATIVE)."""
    dll = load_library(SOURCE)
    return None if dll is None else Library(dll)
