"""What the engine asks of a network: the trunk over a ragged batch, an MTP layer over one, and logits.

Shapes: N tokens of all sequences of a batch, M of them, d hidden, K experts of a token, Z = vocab_size.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from baleen.model.cache import Batch, LatentPages
from baleen.model.transformer import Transformer


class Result(NamedTuple):
    hidden_Nd: Tensor  # after the final norm
    experts: list[Tensor]  # [N, K] for each MoE layer of the trunk


class Runner(Protocol):
    """Tokens are written to `pages` at their positions first, then attend to all of their sequence up to their own."""

    pages: LatentPages

    def forward(self, batch: Batch) -> Result:
        """The trunk."""
        ...

    def draft(self, depth: int, hidden_Nd: Tensor, batch: Batch) -> Tensor:
        """MTP layer `depth` + 1: h_i of the layer before and t_{i+depth+1} -> h_i [N, d].

        The batch's tokens are t_{i+depth+1}, its positions those of i.
        """
        ...

    def logits(self, hidden_Md: Tensor) -> Tensor:
        """[M, Z], of the trunk's and the MTP layers' hidden states alike."""
        ...


class TorchRunner:
    """The model itself: on every device, and the twin to which other runners are held."""

    def __init__(self, model: Transformer, pages: LatentPages):
        self.model, self.pages = model, pages

    def forward(self, batch: Batch) -> Result:
        output = self.model(self._ids(batch), cache=self.pages.view(batch))
        return Result(output.hidden_BTd[0], [routing.indices_NK for routing in output.routings])

    def draft(self, depth: int, hidden_Nd: Tensor, batch: Batch) -> Tensor:
        cache = self.pages.view(batch)
        return self.model.predict_ahead(depth, hidden_Nd[None], self._ids(batch), cache=cache).hidden_BTd[0]

    def logits(self, hidden_Md: Tensor) -> Tensor:
        return self.model.logits(hidden_Md)

    def _ids(self, batch: Batch) -> Tensor:
        return torch.tensor([batch.tokens], device=self.model.device)
