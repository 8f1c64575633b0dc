"""Safetensors written as a stream: the headers first, then tensors in whatever order they come.

So a checkpoint passes from one layout to another with one tensor in memory. Each header carries a CRC-32 of every
tensor, which `huggingface` checks on reading; other readers ignore it.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from baleen.config import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CRC = "crc32:"  # + tensor name: a key of the header's metadata
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Spec(NamedTuple):
    """What a tensor will be on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@contextmanager
def replaced_when_complete(directory: Path) -> Iterator[Path]:
    """A fresh folder beside `directory` that takes its place when the block ends without an error.

    After an error nothing is left of it, and `directory` is as it was.
    """
    directory = directory.absolute()
    aside, old = (directory.with_name(f".{directory.name}.{end}") for end in ("partial", "old"))
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if directory.exists():
            directory.rename(old)
        aside.rename(directory)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not directory.exists():
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in main memory, without copying a contiguous one."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class ShardWriter:
    """Writes tensors of known dtype and shape into model.safetensors, or into numbered shards with an index.

    Use as a context manager; on leaving it without an error every tensor of `specs` must have been written once.
    """

    def __init__(self, directory: Path, specs: Mapping[str, Spec], max_shard_bytes: int = 5 * 10**9):
        shards = _plan(specs, max_shard_bytes)
        width = len(shards)
        files = [SINGLE] if width == 1 else [f"model-{i + 1:05d}-of-{width:05d}.safetensors" for i in range(width)]
        self._specs = dict(specs)
        self._crc: dict[str, int] = {}
        self._offsets: dict[str, tuple[BinaryIO, int]] = {}
        self._files: dict[BinaryIO, list[str]] = {}
        for file, names in zip(files, shards, strict=True):
            stream = (directory / file).open("w+b")
            self._files[stream] = names
            offset = stream.write(self._header(names))
            for name in names:
                self._offsets[name] = (stream, offset)
                offset += specs[name].nbytes
            stream.truncate(offset)
        if width > 1:
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, cast to the dtype of its spec."""
        spec = self._specs[name]
        assert tuple(tensor.shape) == spec.shape, f"{name} is {tuple(tensor.shape)}, announced as {spec.shape}"
        assert name not in self._crc, f"{name} was written twice"
        data = raw_bytes(tensor.detach().to("cpu", spec.dtype))
        stream, offset = self._offsets[name]
        stream.seek(offset)
        stream.write(data)
        self._crc[name] = zlib.crc32(data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                missing = self._specs.keys() - self._crc.keys()
                assert not missing, f"never written: {sorted(missing)[:3]}"
                for stream, names in self._files.items():
                    stream.seek(0)
                    stream.write(self._header(names))
                    stream.flush()
                    os.fsync(stream.fileno())
        finally:
            for stream in self._files:
                stream.close()

    def _header(self, names: list[str]) -> bytes:
        """Of the same length before the checksums are known and after."""
        metadata = {"format": "pt"} | {CRC + name: f"{self._crc.get(name, 0):08x}" for name in names}
        header: dict[str, object] = {"__metadata__": metadata}
        offset = 0
        for name in names:
            dtype, shape = self._specs[name]
            end = offset + self._specs[name].nbytes
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def _plan(specs: Mapping[str, Spec], max_shard_bytes: int) -> list[list[str]]:
    """Names by shard, in the order given; within a shard the widest dtypes first, so that all stand aligned."""
    if not specs:
        raise UserError("there are no tensors to write")
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return [sorted(names, key=lambda name: -specs[name].dtype.itemsize) for names in shards]
