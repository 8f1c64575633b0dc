"""What a language model must beat: general compression, and the best classical n-gram of bytes.

Both see text as bytes and answer in bits per byte, so they stand beside a model with any tokenizer.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baleen.config import UserError

# Shapes: N bytes of text, W windows of `order` bytes, G distinct grams, C distinct contexts.
Keys = NDArray[np.uint64]
Floats = NDArray[np.float64]


def xz_bits_per_byte(data: bytes) -> float:
    """Bits per byte of `data` compressed alone by xz at its extreme preset, container included."""
    if not data:
        raise UserError("there is no held-out text to compress: raise data.heldout_fraction or give more text")
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


@dataclass(frozen=True)
class _Table:
    """One order of the interpolation p(w|h) = share(hw) + backoff(h) p(w|h'), h' being h without its first byte."""

    grams_G: Keys
    share_G: Floats
    contexts_C: Keys
    backoff_C: Floats


class NgramModel:
    """Byte n-gram with interpolated modified Kneser-Ney smoothing (Chen and Goodman 1998, Eq. 26-27).

    `order` counts the predicted byte: order 6 looks at five bytes. Grams are read off windows of `order` bytes, the
    first in the highest bits of a uint64, hence order <= 8. Below the top, a gram counts the distinct bytes it follows.
    Order 0 is uniform over the 256 bytes, so every text has a probability.
    """

    def __init__(self, order: int = 6) -> None:
        if not 1 <= order <= 8:
            raise UserError(f"an n-gram of order {order} is not built: take an order from 1 to 8")
        self.order = order
        self._tables: list[_Table] = []

    def fit(self, train: bytes) -> NgramModel:
        """Counts `train`, replacing what was counted before. Raises UserError if it is shorter than one window."""
        if len(train) < self.order:
            raise UserError(
                f"the training text has {len(train)} bytes: an n-gram of order {self.order} needs more text"
            )
        grams_G, counts_G = np.unique(_windows(np.frombuffer(train, np.uint8), self.order), return_counts=True)
        tables = [_table(grams_G, counts_G)]
        for order in range(self.order - 1, 0, -1):
            suffix_mask = np.uint64((1 << 8 * order) - 1)
            grams_G, counts_G = np.unique(grams_G & suffix_mask, return_counts=True)
            tables.append(_table(grams_G, counts_G))
        self._tables = tables[::-1]
        return self

    def probabilities(self, text: bytes) -> Floats:
        """Probability of each byte of `text` given those before it, at most order - 1 of them: [N]."""
        assert self._tables, "fit comes first"
        text_N = np.frombuffer(text, np.uint8)
        p_N = np.full(len(text_N), 1 / 256)
        for order, table in enumerate(self._tables[: len(text_N)], start=1):
            grams_W = _windows(text_N, order)
            share_W = _lookup(table.grams_G, table.share_G, grams_W, missing=0.0)
            backoff_W = _lookup(table.contexts_C, table.backoff_C, grams_W >> np.uint64(8), missing=1.0)
            p_N[order - 1 :] = share_W + backoff_W * p_N[order - 1 :]
        return p_N

    def bits_per_byte(self, heldout: bytes) -> float:
        """Mean of -log2 p over the bytes of `heldout`, which must not be part of the text given to `fit`."""
        if not heldout:
            raise UserError("there is no held-out text to score: raise data.heldout_fraction or give more text")
        return float(-np.log2(self.probabilities(heldout)).mean())


def _windows(text_N: NDArray[np.uint8], size: int) -> Keys:
    keys_W = np.zeros(len(text_N) - size + 1, np.uint64)
    for offset in range(size):
        keys_W <<= np.uint64(8)
        keys_W |= text_N[offset : offset + len(keys_W)]
    return keys_W


def _table(grams_G: Keys, counts_G: NDArray[np.int64]) -> _Table:
    contexts_C, starts_C = np.unique(grams_G >> np.uint64(8), return_index=True)
    discount_G = _discounts(counts_G)[np.minimum(counts_G, 3)]
    totals_C = np.add.reduceat(counts_G, starts_C)
    backoff_C = np.add.reduceat(discount_G, starts_C) / totals_C
    totals_G = np.repeat(totals_C, np.diff(starts_C, append=len(grams_G)))
    return _Table(grams_G, (counts_G - discount_G) / totals_G, contexts_C, backoff_C)


def _discounts(counts_G: NDArray[np.int64]) -> Floats:
    """What is taken from a count of 0, 1, 2, and 3 or more: [4]."""
    seen = np.bincount(np.minimum(counts_G, 5), minlength=6)[1:5]
    if not seen.all():
        return np.array([0.0, 0.5, 0.5, 0.5])  # too little text for the estimate, which divides by these
    y = seen[0] / (seen[0] + 2 * seen[1])
    m = np.arange(1, 4)
    # Odd texts give estimates outside (0, m): nothing left for what was not seen, or less than nothing for what was.
    return np.append(0.0, np.clip(m - (m + 1) * y * seen[1:] / seen[:3], 0.05, m))


def _lookup(keys_G: Keys, values_G: Floats, wanted_W: Keys, missing: float) -> Floats:
    index_W = np.minimum(np.searchsorted(keys_G, wanted_W), len(keys_G) - 1)
    return np.where(keys_G[index_W] == wanted_W, values_G[index_W], missing)
