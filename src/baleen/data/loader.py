"""Packed rows -> batches: shuffled, the same on every number of ranks, resumable at the very next sequence.

Shape legend: B sequences of this rank, S = seq_len.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from baleen.config import UserError
from baleen.data.packing import PackedTokens


@dataclass(frozen=True)
class Batch:
    """int64 tensors of [B, S + 1]: inputs are [:, :-1], targets [:, 1:]. loss_mask None: every target counts."""

    tokens: torch.Tensor
    document_ids: torch.Tensor
    loss_mask: torch.Tensor | None = None


class Loader:
    """An endless sequence of rows, the permutation of epoch e being that of (seed, e), dealt out in global batches.

    The global order depends on `seed` alone. Of each global batch rank r takes the r-th contiguous share; shares
    differ by at most one sequence if the batch does not divide.
    """

    def __init__(self, packed: PackedTokens, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        assert 0 <= rank < world_size
        self._packed = packed
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._position = 0  # sequences given out so far, over all ranks and epochs
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def epoch(self) -> int:
        """Of the next sequence, counted from 0."""
        return self._position // len(self._packed)

    def next_batch(self, sequences: int) -> Batch:
        """This rank's share of the next `sequences` rows; the number may change from call to call."""
        assert sequences >= 1
        start = self._position + self._rank * sequences // self._world_size
        stop = self._position + (self._rank + 1) * sequences // self._world_size
        self._position += sequences
        rows = np.array([self._row(position) for position in range(start, stop)], dtype=np.int64)
        mask = self._packed.loss_mask
        return Batch(
            _tensor(self._packed.tokens[rows]),
            _tensor(self._packed.document_ids[rows]),
            None if mask is None else _tensor(mask[rows]),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position, "seed": self._seed, "data": self._packed.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError if the state is of another corpus or seed: the order would not be the same."""
        if state["seed"] != self._seed:
            raise UserError(f"the checkpoint's data were shuffled with seed {state['seed']}: set train.seed to that")
        if state["data"] != self._packed.fingerprint:
            raise UserError(
                "the checkpoint was made on other text than data.sources now gives: bring the text back as it was, or "
                "begin a new run"
            )
        self._position = int(state["position"])

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, len(self._packed))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self._packed)))
        return int(self._order[1][index])


def _tensor(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows.astype(np.int64))
