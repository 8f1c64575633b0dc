"""Documents of tokens -> rows of equal length, without a gap between them.

Shape legend: N rows, S = seq_len.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np

from baleen.config import UserError

HASHED_AT_ONCE = 2**20  # tokens, so that no copy of them all is made


@dataclass(frozen=True)
class PackedTokens:
    """One stream of tokens, seen as N rows of S + 1: each row's last token is the next row's first.

    So a row gives S transitions, and each transition of the stream is in exactly one row. The tail, fewer than S
    transitions of the whole corpus, is dropped: padding it would need a mask in every step for the sake of one row.
    The flat arrays have N * S + 1 entries and may be memory maps.
    """

    seq_len: int
    flat_tokens: np.ndarray  # int32
    flat_document_ids: np.ndarray  # int32: which document a token is of, counted from 0
    flat_loss_mask: np.ndarray | None = None  # int8: 1 where the token is to be learnt; None: everywhere

    def __len__(self) -> int:
        return (len(self.flat_tokens) - 1) // self.seq_len

    @cached_property
    def fingerprint(self) -> str:
        """Of the length and all tokens; of a GiB or more, of as many tokens spread evenly as make up to one."""
        sample = self.flat_tokens[:: 1 + self.flat_tokens.nbytes // 2**30]
        digest = blake2b(digest_size=12)
        for start in range(0, len(sample), HASHED_AT_ONCE):
            digest.update(sample[start : start + HASHED_AT_ONCE].tobytes())
        digest.update(str(len(self.flat_tokens)).encode())
        return digest.hexdigest()

    @property
    def tokens(self) -> np.ndarray:
        """int32 [N, S + 1], a view."""
        return self._rows(self.flat_tokens)

    @property
    def document_ids(self) -> np.ndarray:
        """int32 [N, S + 1], a view."""
        return self._rows(self.flat_document_ids)

    @property
    def loss_mask(self) -> np.ndarray | None:
        """int8 [N, S + 1], a view; None: every token is to be learnt."""
        return None if self.flat_loss_mask is None else self._rows(self.flat_loss_mask)

    def _rows(self, flat: np.ndarray) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(flat, self.seq_len + 1)[:: self.seq_len]

    @classmethod
    def open(cls, directory: Path, seq_len: int) -> PackedTokens:
        """Memory maps of the files that `pack_to` wrote."""
        mask = directory / "loss_mask.npy"
        return _trimmed(
            seq_len,
            np.load(directory / "tokens.npy", mmap_mode="r"),
            np.load(directory / "document_ids.npy", mmap_mode="r"),
            np.load(mask, mmap_mode="r") if mask.is_file() else None,
        )


@dataclass(frozen=True)
class TokenisedDocument:
    """A document's tokens, bos and eos included. `loss_mask`: 1 at tokens to be learnt; None: all of them."""

    tokens: Sequence[int]
    loss_mask: Sequence[int] | None = None


def whole_in_rows(documents: Iterable[TokenisedDocument], seq_len: int, pad_id: int) -> Iterator[TokenisedDocument]:
    """Documents with padding between them, such that none is cut by the end of a row unless it is longer than one.

    For fine-tuning, where a cut would part an answer from its question. The padding is a document of its own that is
    not learnt; the last row is filled up, so `pack` drops nothing.
    """
    used = 0  # tokens so far, modulo seq_len: a row's last token is also the next row's first

    def padding(count: int) -> TokenisedDocument:
        return TokenisedDocument([pad_id] * count, [0] * count)

    for document in documents:
        assert document.loss_mask is not None, "padding has a loss mask, so the documents need one"
        if used and used + len(document.tokens) > seq_len + 1:
            yield padding(seq_len - used)
            used = 0
        yield document
        used = (used + len(document.tokens)) % seq_len
    if missing := (1 - used) % seq_len:
        yield padding(missing)


def pack(token_lists: Iterable[Sequence[int] | TokenisedDocument], seq_len: int) -> PackedTokens:
    """Packs in memory. Raises UserError if the corpus is shorter than one row."""
    chunks = list(_chunks(token_lists))
    tokens, ids, masks = (list(column) for column in zip(*chunks, strict=True)) if chunks else ([], [], [])
    masked = [mask for mask in masks if mask is not None]
    assert len(masked) in (0, len(masks)), "either every document has a loss mask or none"
    empty = np.zeros(0, dtype=np.int32)
    return _trimmed(
        seq_len,
        np.concatenate([empty, *tokens]),
        np.concatenate([empty, *ids]),
        np.concatenate(masked) if masked else None,
    )


def pack_to(directory: Path, documents: Iterable[TokenisedDocument], seq_len: int) -> PackedTokens:
    """Packs into .npy files of `directory`, one document in memory at a time, and maps them."""
    columns: dict[str, _NpyWriter] = {}
    try:
        for chunk in _chunks(documents):
            for name, array in zip(("tokens", "document_ids", "loss_mask"), chunk, strict=True):
                if array is not None:
                    if name not in columns:
                        columns[name] = _NpyWriter(directory / f"{name}.npy", array.dtype)
                    columns[name].append(array)
    finally:
        for writer in columns.values():
            writer.close()
    assert len({writer.length for writer in columns.values()}) <= 1, "either every document has a loss mask or none"
    if not columns:
        _check_length(0, seq_len)
    return PackedTokens.open(directory, seq_len)


def _chunks(
    documents: Iterable[Sequence[int] | TokenisedDocument],
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    for number, document in enumerate(documents):
        if not isinstance(document, TokenisedDocument):
            document = TokenisedDocument(document)
        tokens = np.asarray(document.tokens, dtype=np.int32)
        mask = None if document.loss_mask is None else np.asarray(document.loss_mask, dtype=np.int8)
        assert mask is None or len(mask) == len(tokens)
        yield tokens, np.full(len(tokens), number, dtype=np.int32), mask


def _trimmed(seq_len: int, tokens: np.ndarray, ids: np.ndarray, mask: np.ndarray | None) -> PackedTokens:
    _check_length(len(tokens), seq_len)
    end = (len(tokens) - 1) // seq_len * seq_len + 1
    return PackedTokens(seq_len, tokens[:end], ids[:end], None if mask is None else mask[:end])


def _check_length(tokens: int, seq_len: int) -> None:
    if tokens < seq_len + 1:
        raise UserError(
            f"the training text has {tokens} tokens, fewer than one sequence of train.seq_len {seq_len} and the token "
            "after it: give more text or a shorter train.seq_len"
        )


class _NpyWriter:
    """A one-dimensional .npy file that grows: the header, whose length numpy pads for this, is rewritten at the end."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._file: BinaryIO = path.open("wb")
        self._dtype = dtype
        self.length = 0
        self._write_header()
        self._header_end = self._file.tell()

    def append(self, array: np.ndarray) -> None:
        self._file.write(array.tobytes())
        self.length += len(array)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._header_end
        self._file.close()

    def _write_header(self) -> None:
        description = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.length,),
        }
        np.lib.format.write_array_header_1_0(self._file, description)
