"""Counts against what PyTorch builds and executes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from baleen.config import ModelConfig
from baleen.cost import flops
from baleen.cost.architecture import from_model_config
from baleen.model import linear, rows, sdpa
from baleen.model.transformer import Transformer

TINY = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
    num_nextn_predict_layers=1, max_position_embeddings=64,
)  # fmt: skip
DENSE = TINY.model_copy(update={"first_k_dense_replace": 4, "q_lora_rank": None, "tie_word_embeddings": True})


@pytest.mark.parametrize("config", [ModelConfig(), TINY, DENSE], ids=["v3", "tiny", "dense"])
def test_parameters_equal_the_meta_device_model(config):
    with torch.device("meta"):
        model = Transformer(config)
    arch = from_model_config(config)
    assert sum(p.numel() for p in model.parameters()) == flops.parameters(arch)["total"] + flops.mtp_parameters(arch)
    trunk = {n: b for n, b in model.named_buffers() if "e_score_correction_bias" in n}
    mtp = arch.mtp_moe_modules * arch.n_routed_experts
    assert sum(b.numel() for b in trunk.values()) == flops.parameters(arch)["selection_bias"] + mtp


@pytest.mark.parametrize("config", [TINY, DENSE], ids=["moe", "dense"])
def test_forward_flops_equal_flop_counter(config, monkeypatch):
    """torch counts uncausal attention and every matmul; our parts add up to it."""
    for module in (sdpa, linear, rows):  # what native kernels compute it does not see
        monkeypatch.setattr(module, "serves", lambda _: False)
    B, T = 2, 24
    model = Transformer(config)
    model.init_weights(0)
    ids = torch.randint(0, config.vocab_size, (B, T))
    # torch counts attention's products only where it runs them one by one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model(ids)
        model.logits(out.hidden_BTd)
        main = counter.get_total_flops()
        model.logits(model.predict_ahead(0, out.hidden_BTd, ids).hidden_BTd)
    arch = from_model_config(config)
    padding = _padded_values(config, T)
    combine = 2 * config.num_experts_per_tok * config.hidden_size  # experts' outputs are weighed by a product
    ours = sum(flops.forward_flops(arch, T, causal=False).values())
    ours += config.num_hidden_layers * padding + arch.moe_layers * combine
    assert main == pytest.approx(B * T * ours, rel=1e-6)
    mtp = flops.mtp_forward_flops(arch, T, causal=False) + padding + arch.mtp_moe_modules * combine
    assert counter.get_total_flops() - main == pytest.approx(B * T * mtp, rel=1e-6)


def _padded_values(config: ModelConfig, context: int) -> float:
    """On CPUs values are padded to the keys' width for a faster kernel: multiplications with nothing."""
    return 2 * context * config.num_attention_heads * max(0, config.qk_head_dim - config.v_head_dim)
