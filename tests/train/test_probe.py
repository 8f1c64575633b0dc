"""Probing: real steps on random tokens, as the cost engine asks for them."""

from baleen.recipe import Recipe
from baleen.train.probe import time_steps

TINY = Recipe.model_validate(
    {
        "model": dict(
            vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
            v_head_dim=8, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
            first_k_dense_replace=1, num_nextn_predict_layers=0, max_position_embeddings=64,
        ),
        "train": dict(tokens=10_000, batch_tokens=64, seq_len=16, lr=1e-3, precision="fp32"),
    }
)  # fmt: skip


def test_every_recipe_gets_its_steps_and_only_the_first_its_memory():
    first, second = time_steps([TINY, TINY], steps=2)
    assert first["seconds"] > 0 and second["seconds"] > 0 and first["update_seconds"] > 0
    assert first["precision"] == "fp32" and second["peak_bytes"] is None
    assert first["parameters"] == second["parameters"] > 64 * 32 * 2
