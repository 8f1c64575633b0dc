"""Multi-token prediction (arXiv 2412.19437 §2.2, Eq. 21-25): one more layer per further token, trained with the trunk.

Shapes: B batch, T tokens, d hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from baleen.config import ModelConfig
from baleen.model.attention import Context, RMSNorm
from baleen.model.layer import DecoderLayer
from baleen.model.linear import Linear
from baleen.model.moe import Routing


class SharedHead(nn.Module):
    """The module's own norm before the output head that it shares with the trunk."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPLayer(DecoderLayer):
    """M_k of Eq. 21: joins h_i^{k-1} with the embedding of t_{i+k} and predicts t_{i+k+1}.

    Two facts of the released weights differ from the text, and we follow the weights: `eh_proj` takes
    [enorm(embedding) ; hnorm(hidden)], the reverse of Eq. 21, and the hidden state comes after the final norm of the
    trunk (for k = 1) or of the layer before (its shared_head.norm).
    """

    def __init__(self, config: ModelConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def predict(self, hidden_BTd: Tensor, embedding_BTd: Tensor, context: Context) -> tuple[Tensor, Routing | None]:
        """h^{k-1} and Emb(t_{i+k}) -> h^k after its norm, ready for the output head, and the routing."""
        joined = torch.cat((self.enorm(embedding_BTd), self.hnorm(hidden_BTd)), dim=-1)
        hidden, routing = self(self.eh_proj(joined), context)
        return self.shared_head.norm(hidden), routing
