"""The whole network: embedding, L decoder layers, final norm, output head, D MTP layers.

Parameter names are those of the released checkpoints; the MTP layers are model.layers.{L}, {L+1}, ...
Shapes: B batch, T tokens, d hidden, Z = vocab_size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from baleen.config import ModelConfig
from baleen.model.attention import Context, RMSNorm, document_mask
from baleen.model.cache import CacheView
from baleen.model.initial import fill
from baleen.model.layer import DecoderLayer
from baleen.model.linear import Linear
from baleen.model.moe import DeepseekMoE, Gate, Routing
from baleen.model.mtp import MTPLayer
from baleen.model.rope import RotaryEmbedding


class Output(NamedTuple):
    hidden_BTd: Tensor  # after the final norm: what the output head and the first MTP layer read
    routings: list[Routing]  # one per MoE layer, in order


class Trunk(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        layers += [MTPLayer(config, config.num_hidden_layers + k) for k in range(config.num_nextn_predict_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)


class Transformer(nn.Module):
    """DeepSeek-V3 at any size (arXiv 2412.19437 §2). Weights are uninitialised until `init_weights` or a checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def trunk_layers(self) -> list[DecoderLayer]:
        return list(self.model.layers)[: self.config.num_hidden_layers]  # type: ignore[arg-type]

    @property
    def mtp_layers(self) -> list[MTPLayer]:
        return list(self.model.layers)[self.config.num_hidden_layers :]  # type: ignore[arg-type]

    @property
    def gates(self) -> list[Gate]:
        """Gates of all MoE layers, trunk first, then MTP: the order of the routings that a training step returns."""
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, DeepseekMoE)]  # type: ignore[union-attr]

    def init_weights(self, seed: int) -> None:
        """As V3 begins (§4.2; see initial.py)."""
        for name, parameter in self.named_parameters():
            fill(parameter, name, self.config, seed)
        for gate in self.gates:
            gate.e_score_correction_bias.zero_()
        self.model.rotary.reset_parameters()

    def forward(
        self,
        input_ids_BT: Tensor,
        *,
        document_ids_BT: Tensor | None = None,
        cache: CacheView | None = None,
    ) -> Output:
        """The trunk over token ids.

        document_ids_BT: tokens attend only within their own document. cache: in its place; input_ids_BT are the tokens
        of its batch, [1, N], and are written to it.
        """
        context = self._context(input_ids_BT, document_ids_BT, cache)
        x_BTd, routings = self.model.embed_tokens(input_ids_BT), []
        for layer in self.trunk_layers:
            x_BTd, routing = layer(x_BTd, context)
            if routing is not None:
                routings.append(routing)
        return Output(self.model.norm(x_BTd), routings)

    def predict_ahead(
        self,
        depth: int,
        hidden_BTd: Tensor,
        next_ids_BT: Tensor,
        *,
        document_ids_BT: Tensor | None = None,
        cache: CacheView | None = None,
    ) -> Output:
        """MTP layer k = depth + 1 (Eq. 21-23): h^{k-1}_i with t_{i+k} -> h^k_i, from which t_{i+k+1} is predicted.

        hidden_BTd: the trunk's output for depth 0, this method's own for the next. next_ids_BT: t_{i+k}, the *input*;
        feeding t_{i+k+1} would train a copier.
        """
        layer = self.mtp_layers[depth]
        context = self._context(next_ids_BT, document_ids_BT, cache)
        hidden, routing = layer.predict(hidden_BTd, self.model.embed_tokens(next_ids_BT), context)
        return Output(hidden, [] if routing is None else [routing])

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., Z], for the trunk's and the MTP layers' hidden states alike."""
        return self.lm_head(hidden)

    def _context(self, ids_BT: Tensor, document_ids_BT: Tensor | None, cache: CacheView | None) -> Context:
        B, T = ids_BT.shape
        if cache is None:
            positions_BT = torch.arange(T, device=ids_BT.device).expand(B, T)
        else:
            assert B == 1 and document_ids_BT is None, "the cache knows who is who"
            positions_BT = cache.positions_N[None]
        cos, sin = self.model.rotary(positions_BT, self.model.norm.weight.dtype)
        return Context(cos, sin, document_mask(document_ids_BT), cache)
