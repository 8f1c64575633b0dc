"""A GGUF file (llama.cpp's format, version 2 and 3), read with every length checked against the size of the file.

The `gguf` library knows the quantised blocks; its own reader believes what a header says, so the header is read here.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from baleen.config import UserError

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def gguf_library() -> Any:
    """The package gguf. Raises UserError if it is missing."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf: pip install 'baleen-lm[gguf]'") from None
    return gguf


class Damaged(Exception):
    """The bytes do not make a GGUF file."""


class TensorInfo(NamedTuple):
    kind: int  # a GGMLQuantizationType
    shape: tuple[int, ...]  # rows first, as in PyTorch
    offset: int
    nbytes: int


class GGUFFile:
    """`fields` by key, and tensors by name, dequantised one at a time.

    Raises UserError for a damaged file, a version or a quantisation that Baleen does not know, or if `gguf` is missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._gguf = gguf_library()
        try:
            with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                reader = _Reader(data)
                self.fields, infos, start = reader.header()
                self.tensors = {name: self._info(info, start, len(data)) for name, info in infos.items()}
        except (Damaged, OSError, ValueError) as error:
            raise UserError(f"{self.path} is damaged or not GGUF: {error}") from None
        parts = self.fields.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise UserError(
                f"{self.path} is one of {parts} parts: join them, by `llama-gguf-split --merge FIRST OUT.gguf`"
            )

    def read(self, name: str, index: int | None = None) -> Tensor:
        """One tensor in float32, or tensor[index] of it.

        Raises UserError if it is missing, not finite, or of an unknown quantisation.
        """
        if name not in self.tensors:
            raise UserError(f"{self.path} lacks {name}")
        info = self.tensors[name]
        if index is not None:
            nbytes = info.nbytes // info.shape[0]
            info = TensorInfo(info.kind, info.shape[1:], info.offset + index * nbytes, nbytes)
        kind = self._gguf.GGMLQuantizationType(info.kind)
        with self.path.open("rb") as file:
            file.seek(info.offset)
            data = np.fromfile(file, np.uint8, info.nbytes)
        rows = data.reshape(*info.shape[:-1], -1)
        try:
            numbers = self._gguf.quants.dequantize(rows, kind).astype(np.float32)
        except NotImplementedError:
            raise UserError(f"{name} in {self.path} is {kind.name}, a quantisation that Baleen does not read") from None
        if not np.isfinite(numbers).all():
            raise UserError(f"{name} in {self.path} holds NaN or infinite values")
        return torch.from_numpy(numbers.reshape(info.shape))

    def field(self, key: str, kind: type, default: Any = None) -> Any:
        """A metadata value. Raises UserError if it is missing without a default, or of another type.

        A float is the shortest decimal that was rounded to the float32 in the file: 1e-06, not 9.999999974752427e-07.
        """
        value = self.fields.get(key, default)
        if kind is float and isinstance(value, int | float):
            value = float(str(np.float32(value)))
        if not isinstance(value, kind) and not (value is default is not None):
            raise UserError(f"{self.path} has {key} = {str(value)[:40]!r}: Baleen needs a {kind.__name__}")
        return value

    def _info(self, info: TensorInfo, start: int, size: int) -> TensorInfo:
        """With the offset in the file, if the tensor lies within it."""
        try:
            kind = self._gguf.GGMLQuantizationType(info.kind)
        except ValueError:
            raise Damaged(f"tensor type {info.kind} is unknown") from None
        block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        if info.shape[-1] % block:
            raise Damaged(f"rows of {info.shape[-1]} are not whole blocks of {block}")
        nbytes = math.prod(info.shape) // block * block_bytes
        if start + info.offset + nbytes > size:
            raise Damaged("a tensor lies beyond the end of the file")
        return info._replace(offset=start + info.offset, nbytes=nbytes)


class _Reader:
    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def header(self) -> tuple[dict[str, Any], dict[str, TensorInfo], int]:
        """(fields, tensors, where the tensors' data begins)"""
        if self.take(4) != MAGIC:
            raise Damaged("it does not begin with GGUF")
        if (version := self.number("<I")) not in (2, 3):
            raise Damaged(f"version {version}")
        tensor_count, field_count = self.number("<Q"), self.number("<Q")
        fields: dict[str, Any] = {}
        for _ in range(self.bounded(field_count, 12)):
            key = self.string()
            fields[key] = self.value(self.number("<I"))
        infos: dict[str, TensorInfo] = {}
        for _ in range(self.bounded(tensor_count, 24)):
            name, rank = self.string(), self.number("<I")
            if not 1 <= rank <= 4 or name in infos:
                raise Damaged(f"tensor {name[:60]!r} has {rank} dimensions or stands twice")
            shape = tuple(self.number("<Q") for _ in range(rank))[::-1]
            kind, offset = self.number("<I"), self.number("<Q")
            if 0 in shape:
                raise Damaged(f"tensor {name[:60]!r} is empty")
            infos[name] = TensorInfo(kind, shape, offset, 0)
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            raise Damaged(f"alignment {alignment}")
        return fields, infos, -(-self.at // alignment) * alignment

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(self.scalar(kind))
        item, count = self.number("<I"), self.number("<Q")
        if item == STRING:
            return [self.string() for _ in range(self.bounded(count, 8))]
        form = self.scalar(item)
        width = struct.calcsize(form)
        raw = self.take(self.bounded(count, width) * width)
        return list(struct.unpack(f"<{count}{form[1]}", raw))

    def scalar(self, kind: int) -> str:
        if kind not in SCALARS:
            raise Damaged(f"value type {kind} is unknown")
        return SCALARS[kind]

    def string(self) -> str:
        return self.take(self.bounded(self.number("<Q"), 1)).decode("utf-8", errors="replace")

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def bounded(self, count: int, width: int) -> int:
        """`count`, if so many items of at least `width` bytes can still follow."""
        if count * width > len(self.data) - self.at:
            raise Damaged(f"it announces {count} items beyond its end")
        return count

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise Damaged("it ends too early")
        self.at += count
        return self.data[self.at - count : self.at]
