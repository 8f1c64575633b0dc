"""Checkpoints of several processes, by torch.distributed.checkpoint: sharded, asynchronous, resharded on load.

Every rank writes its pieces into one safetensors file, whose header says where each lies in its whole tensor:

    shards/shard-00001-model-00001-of-00001.safetensors    rank 0's, tensors named GROUP/NAME

and so any layout reads any other's checkpoint, one process included. No pickle: PyTorch's usual index is one, its
safetensors headers are JSON.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from baleen.config import UserError

SHARDS = "shards"
Groups = dict[str, dict[str, Tensor]]  # {"model": {name: tensor}, "optimizer": ..., "ema": ...}
Shapes = dict[str, dict[str, torch.Size]]


def begin_save(directory: Path, groups: Groups, talk: dist.ProcessGroup) -> Future[Any]:
    """Copy the tensors aside and write them into `directory` while training goes on. Called by all ranks.

    Tensors that are spread over ranks come as DTensors. `talk`: a gloo group of all ranks for this alone. The future
    raises on every rank if one of them could not write.
    """
    flat = {f"{group}/{name}": _with_a_dimension(t) for group, tensors in groups.items() for name, t in tensors.items()}
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    future = async_save(flat, storage_writer=writer, process_group=talk)
    assert isinstance(future, Future)
    return future


def shard_file(rank: int) -> str:
    """The file that a rank writes."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def stored_shapes(directory: Path) -> Shapes:
    """Of what lies in `directory`; opens every shard."""
    shapes: Shapes = {}
    for key, tensor in HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata.items():
        group, _, name = key.partition("/")
        assert isinstance(tensor, TensorStorageMetadata)
        shapes.setdefault(group, {})[name] = tensor.size
    return shapes


def read_shards(directory: Path, groups: Groups, stored: Shapes) -> None:
    """Fill these tensors, or the pieces of DTensors that lie here, from shards of any layout. Called by all ranks.

    stored: the directory's `stored_shapes`. Raises UserError for a tensor that is missing there or has another shape.
    """
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            require_shape(name, stored.get(group, {}).get(name), _with_a_dimension(tensor).shape)
    flat = {f"{group}/{name}": _with_a_dimension(t) for group, tensors in groups.items() for name, t in tensors.items()}
    load(flat, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=not dist.is_initialized())


def copy_piece(target: Tensor, whole: Tensor) -> None:
    """The piece of `whole` that lies here of a DTensor `target`, or all of it."""
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    local = target.to_local()
    local.copy_(whole[tuple(slice(o, o + size) for o, size in zip(offset_of(target), local.shape, strict=True))])


def offset_of(tensor: DTensor) -> tuple[int, ...]:
    """Where the piece that lies here begins in the whole."""
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]


def require_shape(name: str, stored: torch.Size | None, wanted: torch.Size) -> None:
    """Raises UserError unless a checkpoint's tensor has this shape."""
    if stored is None:
        raise UserError(f"the checkpoint has no {name}: it is of another model")
    if stored != wanted:
        raise UserError(f"the checkpoint's {name} is {tuple(stored)} and {tuple(wanted)} here: it is of another model")


def _with_a_dimension(tensor: Tensor) -> Tensor:
    """Optimizers count their steps in tensors without dimension, of which there is no slice to read: a view."""
    return tensor if tensor.ndim else tensor.view(1)
