"""One transformer block: MLA and a feed-forward network, each behind an RMSNorm and beside a residual."""

from __future__ import annotations

from torch import Tensor, nn

from baleen.config import ModelConfig
from baleen.model.attention import Context, LatentAttention, RMSNorm
from baleen.model.moe import MLP, DeepseekMoE, Routing


class DecoderLayer(nn.Module):
    """Layers below first_k_dense_replace have a dense MLP, the others DeepSeekMoE."""

    def __init__(self, config: ModelConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            DeepseekMoE(config) if config.is_moe_layer(layer_idx) else MLP(config.hidden_size, config.intermediate_size)
        )

    def forward(self, x_BTd: Tensor, context: Context) -> tuple[Tensor, Routing | None]:
        """[B, T, d] -> ([B, T, d], the gate's decision if the layer has one)."""
        x_BTd = x_BTd + self.self_attn(self.input_layernorm(x_BTd), context)
        u_BTd = self.post_attention_layernorm(x_BTd)
        if isinstance(self.mlp, DeepseekMoE):
            y_BTd, routing = self.mlp(u_BTd)
            return x_BTd + y_BTd, routing
        return x_BTd + self.mlp(u_BTd), None
