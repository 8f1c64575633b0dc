"""A recipe of stages on a network so small that a step takes a blink."""

from baleen.align.recipe import AlignRecipe

MODEL = {
    "vocab_size": 276, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "q_lora_rank": 0, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
SFT = {
    "kind": "sft",
    "worked": 40,
    "train": {"tokens": 512, "batch_tokens": 128, "seq_len": 64, "lr": 1e-2, "precision": "fp32"},
}


def tiny_recipe(*stages, **keys) -> AlignRecipe:
    base = {"name": "tiny", "model": MODEL, "tasks": [{"name": "chain_sum", "terms": [2, 3]}]}
    return AlignRecipe.model_validate({**base, "stages": stages, **keys})
