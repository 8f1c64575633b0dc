"""Which documents are kept, and which of those are held out."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from baleen.data.document import Document

# English prose compresses to about 0.45 of its size, source code to 0.2, a phrase said over and over to 0.02.
MIN_COMPRESSED_SHARE = 0.08
MIN_REPETITION_BYTES = 1000  # below this zlib has too little to go by
SHINGLE_WORDS = 5
BANDS, ROWS = 12, 6  # two documents meet with probability 1-(1-J^6)^12: 0.18 at Jaccard J = 0.5, 0.98 at 0.8
NEAR_DUPLICATE_SHARE = 0.8  # of equal minima, an estimate of J
WORD = re.compile(r"\w+")


def clean(
    documents: Iterable[Document], *, min_chars: int = 1, counts: Counter[str] | None = None
) -> Iterator[Document]:
    """Documents that are long enough, not too repetitive, and not seen before, exactly or nearly.

    `counts` tells the rest: "documents_read", "documents_filtered", "documents_duplicate".
    """
    counts = Counter() if counts is None else counts
    seen, near = set[int](), NearDuplicates()
    for document in documents:
        counts["documents_read"] += 1
        if len(document.text.strip()) < max(1, min_chars) or is_repetitive(document.text):
            counts["documents_filtered"] += 1
            continue
        key = text_hash(document.text)
        if key in seen or near.add(document.text):
            counts["documents_duplicate"] += 1
            continue
        seen.add(key)
        yield document


def text_hash(text: str) -> int:
    """64 bits of the text, case and white space apart: the same on every machine and in every version of Python."""
    normalised = " ".join(text.casefold().split())
    return int.from_bytes(blake2b(normalised.encode(errors="surrogatepass"), digest_size=8).digest())


def is_repetitive(text: str) -> bool:
    raw = text.encode(errors="surrogatepass")
    return len(raw) >= MIN_REPETITION_BYTES and len(zlib.compress(raw, 1)) < MIN_COMPRESSED_SHARE * len(raw)


class NearDuplicates:
    """MinHash over hashed shingles with banding (Broder 1997): `add` says whether a near twin came before.

    A text of less than one shingle has no near twins: there a sign is the difference ("3 < 5", "3 > 5").
    Memory: some 3.5 KB a document, whatever its length.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._multiply_P = rng.integers(1, 2**63, BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
        self._add_P = rng.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64)
        self._buckets: dict[tuple[int, bytes], list[int]] = {}
        self._signatures: list[np.ndarray] = []
        self._hash_word = lru_cache(maxsize=2**16)(lambda word: zlib.crc32(word.encode(errors="surrogatepass")))

    def add(self, text: str) -> bool:
        if len(WORD.findall(text.casefold())) < SHINGLE_WORDS:
            return False
        signature = self._signature(text)
        keys = [(band, signature[band * ROWS : (band + 1) * ROWS].tobytes()) for band in range(BANDS)]
        candidates = {index for key in keys for index in self._buckets.get(key, ())}
        if any(np.mean(self._signatures[index] == signature) >= NEAR_DUPLICATE_SHARE for index in candidates):
            return True
        for key in keys:
            self._buckets.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(signature)
        return False

    def _signature(self, text: str) -> np.ndarray:
        words = np.asarray([self._hash_word(word) for word in WORD.findall(text.casefold())], dtype=np.uint64)
        shingles = np.zeros(len(words) - SHINGLE_WORDS + 1, dtype=np.uint64)
        for offset in range(SHINGLE_WORDS):
            shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + len(shingles)]
        shingles ^= shingles >> np.uint64(31)
        minima = np.full(BANDS * ROWS, 2**64 - 1, dtype=np.uint64)
        for chunk in np.array_split(shingles, 1 + len(shingles) // 4096):  # bounds the memory of a long document
            hashes_NP = chunk[:, None] * self._multiply_P + self._add_P
            minima = np.minimum(minima, hashes_NP.min(axis=0, initial=2**64 - 1))
        return (minima >> np.uint64(32)).astype(np.uint32)


def heldout_threshold(hashes: Sequence[int], heldout_fraction: float) -> int:
    """Documents whose `text_hash` is below this are held out: about that fraction, and at least one if it is not 0."""
    threshold = int(heldout_fraction * 2**64)
    return max(threshold, min(hashes) + 1) if threshold and hashes else threshold


def split(documents: Iterable[Document], heldout_fraction: float) -> tuple[list[Document], list[Document]]:
    """(train, held-out), decided by the hash of each text alone: no seed, and no text is on both sides."""
    documents = list(documents)
    hashes = [text_hash(document.text) for document in documents]
    threshold = heldout_threshold(hashes, heldout_fraction)
    train = [d for d, h in zip(documents, hashes, strict=True) if h >= threshold]
    heldout = [d for d, h in zip(documents, hashes, strict=True) if h < threshold]
    return train, heldout
