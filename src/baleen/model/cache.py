"""The latent cache of MLA, in pages: per token and layer only c^KV (after its norm) and the rotated k^R are kept.

Shapes: B sequences, N new tokens of all of them, T new tokens of one, S visible tokens, P pages of a sequence,
C = kv_lora_rank + qk_rope_head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from baleen.config import ModelConfig

SMALL = 1024  # pages that are read in one piece however unlike their sequences are


@dataclass(frozen=True)
class Batch:
    """New tokens of B sequences, one sequence after the other, whatever their number.

    Sequence b brings `counts[b]` tokens, which stand at positions `starts[b]`, `starts[b]` + 1, ...; its position p is
    kept in page `tables[b][p // page_size]`. Most economical if sequences of equal count are neighbours.
    """

    tokens: Sequence[int]  # N
    starts: Sequence[int]  # B
    counts: Sequence[int]  # B
    tables: Sequence[Sequence[int]]  # B, each of P pages or more

    def positions(self) -> list[int]:
        """Of all N tokens."""
        pairs = zip(self.starts, self.counts, strict=True)
        return [position for start, count in pairs for position in range(start, start + count)]


class LatentPages:
    """Memory for the latents of all sequences: [layers, pages, page_size, C]; the MTP layers' rows follow the trunk's.

    A token is written at its position, and a query sees the positions up to its own. So a sequence is shortened by
    continuing it from an earlier position: what a rejected draft has written lies beyond every query until it is
    overwritten. Which page belongs to whom is the caller's business.
    """

    def __init__(
        self,
        config: ModelConfig,
        count: int,
        *,
        page_size: int = 16,
        mtp: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.page_size = page_size
        layers = config.num_layers_with_mtp if mtp else config.num_hidden_layers
        self.latents = _zeros((layers, count, page_size, config.latent_dim), dtype, torch.device(device))

    @property
    def count(self) -> int:
        return self.latents.shape[1]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token of one sequence takes, over all layers."""
        return self.latents.shape[0] * self.latents.shape[3] * self.latents.element_size()

    def view(self, batch: Batch) -> CacheView:
        """What one forward over this batch writes and sees."""
        size = self.page_size
        slots = [
            table[p // size] * size + p % size
            for start, count, table in zip(batch.starts, batch.counts, batch.tables, strict=True)
            for p in range(start, start + count)
        ]
        positions_N = torch.tensor(batch.positions(), device=self.latents.device)
        slots_N = torch.tensor(slots, device=self.latents.device)
        return CacheView(self, positions_N, slots_N, _segments(batch, positions_N, size))

    def decoding_view(self, positions_B: Tensor, slots_B: Tensor, tables_BP: Tensor) -> CacheView:
        """The same for one token of each sequence, by tensors alone: Python knows no more of them than their shapes."""
        (B, P), size = tables_BP.shape, self.page_size
        mask = (torch.arange(P * size, device=positions_B.device) <= positions_B[:, None, None])[:, None]
        segment = Segment(slice(0, B), (B, 1), tables_BP.flatten(), P * size, mask, False, False)
        return CacheView(self, positions_B, slots_B, [segment])


class Segment(NamedTuple):
    """Neighbouring sequences with equally many new tokens: their attention is one dense computation."""

    tokens: slice  # of the N
    shape: tuple[int, int]  # B, T
    pages: Tensor | slice  # [B * P], or of one sequence whose pages lie side by side
    visible: int  # S
    mask_B1TS: Tensor  # True where a query sees a key
    is_causal: bool  # plainly so: T = S
    sees_all: bool


class CacheView:
    """The pages as one forward sees them; its tokens are the model's input as [1, N]."""

    def __init__(self, pages: LatentPages, positions_N: Tensor, slots_N: Tensor, segments: list[Segment]):
        self._flat = pages.latents.flatten(1, 2)
        self._pages = pages.latents
        self.positions_N, self._slots_N, self.segments = positions_N, slots_N, segments

    def write(self, layer_idx: int, latents_NC: Tensor) -> None:
        """Keep the new latents of one layer."""
        self._flat[layer_idx].index_copy_(0, self._slots_N, latents_NC.to(self._flat.dtype))

    def read(self, layer_idx: int, segment: Segment) -> Tensor:
        """What the sequences of a segment can see, [B, S, C]; beyond a sequence's own end: anything."""
        B, _ = segment.shape
        layer = self._pages[layer_idx]
        if isinstance(segment.pages, slice):
            return layer[segment.pages].flatten(0, 1)[None, : segment.visible]
        gathered = layer.index_select(0, segment.pages)
        return gathered.view(B, -1, gathered.shape[-1])[:, : segment.visible]


def padded(table: Sequence[int], width: int) -> list[int]:
    """The first `width` pages of a sequence; one that has fewer reads its last page again, behind the mask."""
    kept = list(table[:width])
    return kept + kept[-1:] * (width - len(kept))


def _segments(batch: Batch, positions_N: Tensor, size: int) -> list[Segment]:
    device, segments, first = positions_N.device, [], 0
    for rows in _alike(batch, size):
        T = batch.counts[rows[0]]
        tokens = slice(first, first + len(rows) * T)
        first = tokens.stop
        ends = [batch.starts[b] + T for b in rows]
        visible = max(ends)
        width = -(-visible // size)
        tables = [padded(batch.tables[b], width) for b in rows]
        pages = _neighbours(tables[0]) if len(rows) == 1 else None
        if pages is None:
            pages = torch.tensor(tables, device=device).flatten()
        positions_BT = positions_N[tokens].view(len(rows), T)
        mask = (torch.arange(visible, device=device) <= positions_BT[..., None])[:, None]
        is_level = min(ends) == visible
        segments.append(
            Segment(tokens, (len(rows), T), pages, visible, mask, is_level and visible == T, is_level and T == 1)
        )
    return segments


def _alike(batch: Batch, size: int) -> Iterator[list[int]]:
    """Neighbours with equally many new tokens that, read as far as the longest, are at most twice the pages that they
    have: one long conversation among many short ones would make all of them as long."""
    rows: list[int] = []
    own = widest = 0
    for b, (start, count) in enumerate(zip(batch.starts, batch.counts, strict=True)):
        width = -(-(start + count) // size)
        read = max(widest, width) * (len(rows) + 1)
        if rows and (count != batch.counts[rows[0]] or read > max(SMALL, 2 * (own + width))):
            yield rows
            rows, own, widest = [], 0, 0
        rows.append(b)
        own, widest = own + width, max(widest, width)
    if rows:
        yield rows


def _neighbours(pages: list[int]) -> slice | None:
    """The slice that reads these pages without a copy, if there is one."""
    first = pages[0]
    return slice(first, first + len(pages)) if pages == list(range(first, first + len(pages))) else None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On CPUs memory that takes room only once it is written to, which torch.zeros does at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    element = torch.empty((), dtype=dtype).element_size()
    return torch.from_numpy(np.zeros(int(np.prod(shape)) * element, dtype=np.uint8)).view(dtype).view(shape)
