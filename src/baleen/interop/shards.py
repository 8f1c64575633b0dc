"""Safetensors as streams: read tensor by tensor, written in whatever order tensors come.

So a checkpoint passes from one layout to another with one tensor in memory. The headers that we write carry a CRC-32
of every tensor, which is checked on reading; other readers ignore it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
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
PIECE = 2**20  # elements
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Spec(NamedTuple):
    """What a tensor will be on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@contextmanager
def made_or_refused(out: Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names `out`; of a full disk the command line speaks itself."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{out} cannot be made ({error}): name another place") from None


def new_directory(out: str | Path) -> Path:
    """`out` if it does not exist or is empty. Raises UserError otherwise."""
    out = Path(out)
    with made_or_refused(out):
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        if out.exists():
            raise UserError(f"{out} exists already: name a new folder")
    return out


@contextmanager
def replaced_when_complete(directory: Path) -> Iterator[Path]:
    """A fresh folder beside `directory` that takes its place when the block ends without an error.

    After an error nothing is left of it, and `directory` is as it was. Raises UserError if there can be no such folder,
    or another process is making it.
    """
    directory = directory.resolve()
    aside = directory.with_name(f".{directory.name}.partial")
    with made_or_refused(directory):
        aside.mkdir(parents=True, exist_ok=True)
        claim = claimed(aside, directory)
        for left in aside.iterdir():  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    try:
        yield aside
        put_in_place(aside, directory)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        os.close(claim)


def claimed(aside: Path, out: Path) -> int:
    """A descriptor of `aside` that locks it until it is closed. Raises UserError if another process makes `out`."""
    descriptor = os.open(aside, os.O_RDONLY if aside.is_dir() else os.O_RDWR)  # NFS locks no file opened for reading
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        raise UserError(f"another process is making {out}: wait for it, or name another place") from None
    return descriptor


def sync(path: Path) -> None:
    """What was written to a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(aside: Path, directory: Path) -> None:
    """`aside` becomes `directory`, and what was there goes only then: between the two renames it is `.NAME.old`."""
    directory = directory.resolve()
    old = directory.with_name(f".{directory.name}.old")
    for path in [*aside.rglob("*"), aside]:
        sync(path)
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    try:
        aside.rename(directory)
    except BaseException:
        if old.exists():
            old.rename(directory)
        raise
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in main memory, without copying a contiguous one."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class Shard:
    """One safetensors file, open for reading; use as a context manager.

    The library judges the header, so that no size in it exceeds the file's. The bytes are read, not mapped, so that no
    page of the file stays in memory. Raises UserError for a damaged file and for a dtype outside DTYPES.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            with safe_open(file, framework="pt"):
                pass
            self._stream = file.open("rb")
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file} is damaged or not safetensors: {error}") from None
        length = int.from_bytes(self._stream.read(8), "little")
        header = json.loads(self._stream.read(length))
        self._start = 8 + length
        self._crc = {
            key[len(CRC) :]: crc for key, crc in (header.pop("__metadata__", None) or {}).items() if key.startswith(CRC)
        }
        self._offsets = {name: entry["data_offsets"][0] for name, entry in header.items()}
        self.specs: dict[str, Spec] = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                self._stream.close()
                raise UserError(f"{name} in {file} is {entry['dtype']}, a quantisation that Baleen does not read")
            self.specs[name] = Spec(DTYPES[entry["dtype"]], tuple(entry["shape"]))

    def read(self, name: str) -> Tensor:
        """A whole tensor. Raises UserError if the file has a checksum for it and that does not match."""
        tensor = self._read(self._offsets[name], self.specs[name])
        if name in self._crc and f"{zlib.crc32(raw_bytes(tensor)):08x}" != self._crc[name]:
            raise UserError(f"{name} in {self.file} is damaged: its checksum does not match")
        return tensor

    def read_slice(self, name: str, index: int) -> Tensor:
        """tensor[index], reading no more than that."""
        spec = self.specs[name]
        part = Spec(spec.dtype, spec.shape[1:])
        return self._read(self._offsets[name] + index * part.nbytes, part)

    def _read(self, offset: int, spec: Spec) -> Tensor:
        data = torch.empty(spec.nbytes, dtype=torch.uint8)
        self._stream.seek(self._start + offset)
        if self._stream.readinto(memoryview(data.numpy())) != spec.nbytes:  # type: ignore[arg-type]
            raise UserError(f"{self.file} ends too early")
        return data.view(spec.dtype).view(spec.shape)

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor as flat parts small enough that a copy of one does not matter."""
    return tensor.reshape(-1).split(PIECE)


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
        """Write one tensor, cast to the dtype of its spec. Raises UserError if a value is too large for float16."""
        spec = self._specs[name]
        assert tuple(tensor.shape) == spec.shape, f"{name} is {tuple(tensor.shape)}, announced as {spec.shape}"
        assert name not in self._crc, f"{name} was written twice"
        stream, offset = self._offsets[name]
        stream.seek(offset)
        crc = 0
        for piece in pieces(tensor.detach()):
            piece = piece.to("cpu", spec.dtype)
            if spec.dtype == torch.float16 and not piece.isfinite().all():
                raise UserError(f"{name} holds values that float16 cannot: take bf16 or fp32")
            stream.write(raw_bytes(piece))
            crc = zlib.crc32(raw_bytes(piece), crc)
        self._crc[name] = crc

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
