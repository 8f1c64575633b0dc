"""Shared by all tests: small random networks, the examples of property tests, an environment of nobody's own."""

import os

import pytest
import torch
from hypothesis import settings

from baleen.config import ModelConfig
from baleen.model.transformer import Transformer

for name in ("BALEEN_LAB", "BALEEN_API_KEY"):  # the ledger and the key of whoever runs the tests
    os.environ.pop(name, None)

# The same examples every time, and no verdict on a machine that is busy.
settings.register_profile("baleen", deadline=None, derandomize=True)
settings.load_profile("baleen")

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}


@pytest.fixture
def tiny_config():
    """Makes a ModelConfig of TINY with some keys changed."""
    return lambda **changes: ModelConfig(**{**TINY, **changes})


@pytest.fixture
def tiny_model(tiny_config):
    """Makes an initialised Transformer of TINY with some keys changed, its correction biases and norms random."""

    def make(dtype=torch.float32, seed=0, **changes) -> Transformer:
        model = Transformer(tiny_config(**changes)).to(dtype)
        model.init_weights(seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for gate in model.gates:
                gate.e_score_correction_bias.normal_(0, 0.2, generator=generator)
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.normal_(1.0, 0.2, generator=generator)
        return model

    return make
