"""The latent cache of MLA: per token and layer only c^KV (after its norm) and the rotated k^R are kept.

Shapes: B sequences, T new tokens, S cached tokens, C = kv_lora_rank + qk_rope_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baleen.config import ModelConfig


class LatentCache:
    """Latents of `batch_size` sequences, [layers, B, S, C]; the MTP layers' rows follow the trunk's.

    A token is written at its position, and a query sees the positions up to its own. So a sequence is shortened by
    continuing it from an earlier position: what a rejected draft has written lies beyond every query until it is
    overwritten.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int,
        *,
        mtp: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.config = config
        layers = config.num_layers_with_mtp if mtp else config.num_hidden_layers
        self.latents = torch.zeros(layers, batch_size, max_len, config.latent_dim, dtype=dtype, device=device)
        self.visible = 0
        self._batch = torch.arange(batch_size, device=device)[:, None]

    @property
    def max_len(self) -> int:
        return self.latents.shape[2]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token of one sequence takes, over all layers."""
        return self.latents.shape[0] * self.latents.shape[3] * self.latents.element_size()

    def reserve(self, positions_BT: Tensor) -> None:
        """Make the cache reach the last of these positions; called once a forward, before the layers write."""
        self.visible = int(positions_BT.max()) + 1
        if self.visible > self.max_len:
            layers, batch, _, channels = self.latents.shape
            grown = self.latents.new_zeros(layers, batch, max(self.visible, 2 * self.max_len), channels)
            grown[:, :, : self.max_len] = self.latents
            self.latents = grown

    def update(self, layer_idx: int, latents_BTC: Tensor, positions_BT: Tensor) -> Tensor:
        """Write new latents of one layer at their positions; returns all visible ones, [B, S, C]."""
        layer = self.latents[layer_idx]
        layer[self._batch, positions_BT] = latents_BTC.to(layer.dtype)
        return layer[:, : self.visible]

    def select(self, rows: Tensor) -> None:
        """Keep only these sequences (indices or a mask over B), in this order."""
        self.latents = self.latents[:, rows]
        self._batch = torch.arange(self.latents.shape[1], device=self.latents.device)[:, None]
