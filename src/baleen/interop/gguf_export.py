"""`baleen export --to gguf`: a model directory as one file for llama.cpp, one tensor in memory at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from baleen.config import UserError
from baleen.interop.checkpoint import Checkpoint
from baleen.interop.deepseek2 import ARCHITECTURE, GGUFLayout, settings
from baleen.interop.gguf_file import gguf_library
from baleen.interop.gguf_tokenizer import tokenizer_settings
from baleen.interop.shards import claimed, made_or_refused, sync

DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_1")
FLOAT16_LIMIT = 65520.0  # what rounds to infinity
# Q8_0: the largest of a block over 127 is its float16 scale; Q4_1: the least of a block is kept in float16.
LARGEST = {"F16": FLOAT16_LIMIT, "Q8_0": 127 * FLOAT16_LIMIT, "Q4_1": FLOAT16_LIMIT}
KEPT_WIDE = ("ffn_gate_inp.weight", "exp_probs_b.bias")  # the router decides in float32
FILE_TYPES = {"f32": 0, "f16": 1, "q4_1": 3, "q8_0": 7, "bf16": 32}
CHUNK = 2**18  # elements converted at a time


def export_gguf(directory: Path, out: Path, *, dtype: str = "f32") -> Path:
    """Write the model in `directory` to the file `out`, without its MTP layers; returns `out`.

    dtype: of matrices: f32, f16, bf16, q8_0 or q4_1; vectors and routers stay in float32, and matrices whose rows are
    no whole blocks of 32 in float16. Written aside, then renamed.

    Raises UserError, and writes nothing, for a model that llama.cpp cannot load or would compute wrongly, a tokenizer
    that it does not know, a value that the type cannot hold, and if `out` exists or cannot be made.
    """
    gguf = gguf_library()
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown for GGUF: take one of {', '.join(DTYPES)}")
    if out.suffix != ".gguf":
        raise UserError(f"{out} is no name for a GGUF file: end it in .gguf")
    with made_or_refused(out):
        if out.exists():
            raise UserError(f"{out} exists already: name a new file")
    checkpoint = Checkpoint(directory)
    config = checkpoint.config
    layout = GGUFLayout(config)
    wanted = set(layout.names)
    metadata = settings(config) | tokenizer_settings(directory, config.vocab_size)
    metadata |= {"general.name": directory.absolute().name, "general.file_type": FILE_TYPES[dtype]}
    with _aside(out) as aside:
        target = _Target(gguf, aside, metadata, layout.shapes(), dtype)
        with aside.open("r+b") as file:
            for name, tensor in checkpoint.tensors():
                if name in wanted:
                    for part, piece in layout.split(name, tensor):
                        target.write(file, part.name, part.expert, piece)
            file.flush()
            os.fsync(file.fileno())
    return out


class _Target:
    """A file whose header is written and whose tensors are not yet."""

    def __init__(self, gguf: Any, path: Path, metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]], dtype: str):
        self._gguf = gguf
        self._kinds = {name: self._kind(name, shape, dtype) for name, shape in shapes.items()}
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        for key, value in metadata.items():
            _add(gguf, writer, key, value)
        for name, shape in shapes.items():
            writer.add_tensor_info(name, shape, np.dtype(np.float32), self._nbytes(name, shape), self._kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        at = self._padded(path.stat().st_size)
        self._offsets: dict[str, int] = {}
        for name, shape in shapes.items():
            self._offsets[name] = at
            at += self._padded(self._nbytes(name, shape))
        os.truncate(path, at)

    def write(self, file: BinaryIO, name: str, index: int | None, tensor: Tensor) -> None:
        """A whole tensor, or the part that `index` counts along its first dimension; a few rows at a time, so that
        their float32 and their blocks take little memory."""
        kind = self._kinds[name]
        file.seek(self._offsets[name] + (index or 0) * self._nbytes(name, tuple(tensor.shape)))
        rows = tensor.reshape(-1, tensor.shape[-1])
        for piece in rows.split(max(1, CHUNK // rows.shape[1])):
            values = piece.float().contiguous().numpy()
            if np.abs(values).max() >= LARGEST.get(kind.name, math.inf):
                raise UserError(f"{name} holds values that {kind.name.lower()} cannot: take bf16 or f32")
            file.write(self._gguf.quants.quantize(values, kind).tobytes())

    def _kind(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        kinds = self._gguf.GGMLQuantizationType
        if len(shape) == 1 or name.endswith(KEPT_WIDE):
            return kinds.F32
        kind = kinds[dtype.upper()]
        return kinds.F16 if shape[-1] % self._gguf.GGML_QUANT_SIZES[kind][0] else kind

    def _nbytes(self, name: str, shape: tuple[int, ...]) -> int:
        block, block_bytes = self._gguf.GGML_QUANT_SIZES[self._kinds[name]]
        return int(np.prod(shape, dtype=np.int64)) // block * block_bytes

    def _padded(self, size: int) -> int:
        return self._gguf.GGUFWriter.ggml_pad(size, self._gguf.GGUF_DEFAULT_ALIGNMENT)


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case [int(), *_]:
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32)
        case list():
            writer.add_array(key, value)


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A path beside `out` that takes its place when the block ends without an error, and vanishes after one."""
    aside = out.with_name(f".{out.name}.partial")
    with made_or_refused(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
        claim = claimed(aside, out)
    try:
        yield aside
        sync(aside)
        aside.rename(out)
        sync(out.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    finally:
        os.close(claim)
