"""The forward of step.cpp behind the engine's `Runner`.

Shapes: N tokens of a batch, M of them, d hidden, K experts of a token, Z = vocab_size.
"""

from __future__ import annotations

import ctypes
from array import array
from itertools import accumulate

import torch
from torch import Tensor

from baleen.config import UserError
from baleen.infer.graphs import GraphRunner
from baleen.infer.native.library import Library, Step, native_library
from baleen.infer.native.weights import PANEL, Format, PackedModel
from baleen.infer.runner import Result, Runner, TorchRunner
from baleen.model.cache import Batch, LatentPages
from baleen.model.machine import groups_without_waiting, multiplies_bf16
from baleen.model.native.library import native_mode
from baleen.model.transformer import Transformer


def fastest_runner(model: Transformer, pages: LatentPages, format: Format | None = None) -> Runner:
    """The native one where there is one: on a CPU with a compiler, unless BALEEN_NATIVE=off; else PyTorch's, by CUDA
    graphs on GPUs whose operators wait for nothing.

    format: of the packed weights; None: bf16 for a model in bf16, else fp32. A model in 16 bits that PyTorch must run
    on a CPU without bf16 products is widened to fp32, in place. Raises UserError if a format is asked for, or
    BALEEN_NATIVE=require, and there is no native runner.
    """
    dtype = model.model.norm.weight.dtype
    if model.device.type != "cpu" or dtype == torch.float64:
        reason = f"the model is in {dtype} on {model.device}, native kernels run 32 and 16 bits on CPUs"
        library = None
    else:
        reason = "native kernels are off, or do not compile here"
        library = native_library()
    if library is None:
        if format is not None or native_mode() == "require":
            raise UserError(f"weights in {format or 'any format'} need a native runner: {reason}")
        is_narrow = dtype in (torch.bfloat16, torch.float16)
        if is_narrow and model.device.type == "cpu" and not multiplies_bf16(model.device):
            return TorchRunner(model.float(), _wide(pages, model))
        can_wait_for_nothing = model.device.type == "cuda" and not model.gates
        if can_wait_for_nothing or groups_without_waiting(model.device, dtype):
            return GraphRunner(model, pages)
        return TorchRunner(model, pages)
    return NativeRunner(library, model, _wide(pages, model), format or ("bf16" if dtype == torch.bfloat16 else "fp32"))


def _wide(pages: LatentPages, model: Transformer) -> LatentPages:
    """As many pages in float32; they take memory only as they are used."""
    if pages.latents.dtype == torch.float32:
        return pages
    _, count, page_size, _ = pages.latents.shape
    has_mtp = len(pages.latents) > model.config.num_hidden_layers
    return LatentPages(model.config, count, page_size=page_size, mtp=has_mtp)


class NativeRunner:
    """Reads and writes `pages`, float32 on the CPU; weights in `format`, packed here once."""

    def __init__(self, library: Library, model: Transformer, pages: LatentPages, format: Format = "fp32"):
        assert pages.latents.dtype == torch.float32 and pages.latents.is_contiguous() and not pages.latents.is_cuda
        self.pages, self.config = pages, model.config
        self._moe_layers = sum(model.config.is_moe_layer(i) for i in range(model.config.num_hidden_layers))
        self._packed = PackedModel(library, model, format, model.config.max_position_embeddings)
        self._library = library
        self._forward = library.open(self._packed.struct)

    def __del__(self) -> None:
        if hasattr(self, "_forward"):
            self._library.close(self._forward)

    @property
    def packed_bytes(self) -> int:
        """Of all packed matrices."""
        return self._packed.bytes

    def forward(self, batch: Batch) -> Result:
        """The trunk."""
        routes = torch.empty(self._moe_layers, len(batch.tokens), self.config.num_experts_per_tok, dtype=torch.long)
        return Result(self._run(batch, -1, None, routes), list(routes))

    def draft(self, depth: int, hidden_Nd: Tensor, batch: Batch) -> Tensor:
        """MTP layer `depth` + 1."""
        return self._run(batch, depth, hidden_Nd.contiguous(), None)

    def logits(self, hidden_Md: Tensor) -> Tensor:
        """[M, Z]."""
        hidden_Md = hidden_Md.contiguous()
        vocab = self.config.vocab_size
        logits = torch.empty(len(hidden_Md), vocab + -vocab % PANEL)
        step = Step(outputs=len(hidden_Md), threads=torch.get_num_threads(),
                    hidden_in=hidden_Md.data_ptr(), logits=logits.data_ptr())  # fmt: skip
        self._library.step(self._forward, ctypes.byref(step))
        return logits[:, :vocab]

    def _run(self, batch: Batch, depth: int, hidden_in: Tensor | None, routes: Tensor | None) -> Tensor:
        assert min(batch.starts) >= 0, "a row before the first position would be another sequence's"
        hidden_Nd = torch.empty(len(batch.tokens), self.config.hidden_size)
        ids, starts, counts = array("q", batch.tokens), array("q", batch.starts), array("q", batch.counts)
        tables = array("q", [page for table in batch.tables for page in table])
        table_at = array("q", accumulate(map(len, batch.tables), initial=0))
        latents = self.pages.latents
        step = Step(
            tokens=len(ids), sequences=len(starts), threads=torch.get_num_threads(), mtp_depth=depth,
            page_size=self.pages.page_size, ids=ids.buffer_info()[0], starts=starts.buffer_info()[0],
            counts=counts.buffer_info()[0], tables=tables.buffer_info()[0], table_at=table_at.buffer_info()[0],
            layer_step=latents[0].numel(), pages=latents.data_ptr(), hidden=hidden_Nd.data_ptr(),
            hidden_in=None if hidden_in is None else hidden_in.data_ptr(),
            routes=None if routes is None else routes.data_ptr(),
        )  # fmt: skip
        self._library.step(self._forward, ctypes.byref(step))
        return hidden_Nd
