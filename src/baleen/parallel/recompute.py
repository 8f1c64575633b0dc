"""Activation recomputation, module by module: outputs that the backward makes again instead of keeping (V3 §3.2.3).

A region of the forward is not run twice, as by torch.utils.checkpoint: of each chosen module only the output is
dropped, and made anew from what is kept when the first of its readers needs it. So nothing dear is computed again, and
no token travels again. All three kinds together are V3's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from baleen.model.attention import LatentAttention, RMSNorm
from baleen.model.layer import DecoderLayer
from baleen.model.moe import SwiGLU
from baleen.recipe import Recomputed


def recompute(model: nn.Module, kinds: Iterable[Recomputed], note: Callable[[Tensor], object] | None = None) -> None:
    """In every decoder layer of `model`, drop the outputs of these kinds of modules. Numbers stay what they are.

    note: told of each tensor that is kept, as often as it is.
    """
    if kinds or note:
        for layer in [m for m in model.modules() if isinstance(m, DecoderLayer)]:
            _Layer(layer, set(kinds), note)


class _Dropped:
    """An output of `module`, to be made again of its inputs."""

    def __init__(self, module: nn.Module, inputs: list[Any], device: str):
        self.module, self.inputs, self.device = module, inputs, device
        self.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self.again: Tensor | None = None  # as long as a reader's backward is still to come

    def value(self) -> Tensor:
        again = self.again
        if again is None:
            enabled, dtype = self.autocast
            # with gradients, as the first time: FP8 layers compute otherwise without
            with torch.enable_grad(), torch.autocast(self.device, dtype, enabled=enabled):
                again = self.again = self.module.forward(*map(_unpack, self.inputs)).detach()
        return again


class _View:
    """A tensor in the storage of one that was dropped."""

    def __init__(self, dropped: _Dropped, tensor: Tensor):
        self.dropped, self.layout = dropped, (tensor.shape, tensor.stride(), tensor.storage_offset())

    def value(self) -> Tensor:
        return self.dropped.value().as_strided(*self.layout)


class _Layer:
    """What one layer's forward drops, while it runs."""

    def __init__(self, layer: DecoderLayer, kinds: set[Recomputed], note: Callable[[Tensor], object] | None):
        self.note = note
        self.made: dict[int, tuple[Tensor, _Dropped]] = {}  # by storage; its tensor lives, so that none takes its place
        self.hooks: list[saved_tensors_hooks] = []
        layer.register_forward_pre_hook(self.enter)
        layer.register_forward_hook(self.leave, always_call=True)
        for module in _chosen(layer, kinds):
            module.register_forward_hook(self.drop)

    def enter(self, layer: nn.Module, arguments: Any) -> None:
        if torch.is_grad_enabled():
            self.hooks.append(saved_tensors_hooks(self.pack, _unpack))
            self.hooks[-1].__enter__()

    def leave(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        if self.hooks:
            self.hooks.pop().__exit__(None, None, None)
            self.made.clear()

    def drop(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if self.hooks:
            packed = [self.pack(x.detach()) if isinstance(x, Tensor) else x for x in arguments]
            dropped = _Dropped(module, packed, output.device.type)
            self.made[output.untyped_storage()._cdata] = output, dropped

    def pack(self, tensor: Tensor) -> Tensor | _View:
        found = self.made.get(tensor.untyped_storage()._cdata)
        if found is not None:
            return _View(found[1], tensor)
        if self.note is not None:
            self.note(tensor)
        return tensor


def _unpack(packed: Any) -> Any:
    return packed.value() if isinstance(packed, _View) else packed


def _chosen(layer: DecoderLayer, kinds: set[Recomputed]) -> list[nn.Module]:
    chosen: list[nn.Module] = []
    for module in layer.modules():
        if (isinstance(module, RMSNorm) and "norm" in kinds) or (isinstance(module, SwiGLU) and "swiglu" in kinds):
            chosen.append(module)
        if isinstance(module, LatentAttention) and "up_projection" in kinds:
            chosen += [module.kv_b_proj, *([module.q_b_proj] if module.config.q_lora_rank is not None else [])]
            chosen += [module.rotate, module.attend.joined]  # what becomes of them before PyTorch's attention reads it
    return chosen
