"""The name map, against the index of a 671B checkpoint and the config.json of its relatives: shapes only."""

import math

import pytest

from baleen.config import model_config_from_hf
from baleen.interop.names import CORRECTION_BIAS, Layout, weights_in
from baleen.model.rope import inverse_frequencies, softmax_scale
from baleen.recipe import load_recipe


def released_index(config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of DeepSeek-V3, spelled out from its paper and its modeling code."""
    d, H = config.hidden_size, config.num_attention_heads
    out = {"model.embed_tokens.weight": (129280, d), "model.norm.weight": (d,), "lm_head.weight": (129280, d)}
    for i in range(62):
        layer = f"model.layers.{i}."
        out |= {
            f"{layer}input_layernorm.weight": (d,),
            f"{layer}post_attention_layernorm.weight": (d,),
            f"{layer}self_attn.q_a_proj.weight": (1536, d),
            f"{layer}self_attn.q_a_layernorm.weight": (1536,),
            f"{layer}self_attn.q_b_proj.weight": (H * 192, 1536),
            f"{layer}self_attn.kv_a_proj_with_mqa.weight": (576, d),
            f"{layer}self_attn.kv_a_layernorm.weight": (512,),
            f"{layer}self_attn.kv_b_proj.weight": (H * 256, 512),
            f"{layer}self_attn.o_proj.weight": (d, H * 128),
        }
        mlps = (
            {"mlp.": 18432}
            if i < 3
            else {"mlp.shared_experts.": 2048} | {f"mlp.experts.{e}.": 2048 for e in range(256)}
        )
        for mlp, width in mlps.items():
            out |= {f"{layer}{mlp}{p}_proj.weight": (width, d) for p in ("gate", "up")}
            out[f"{layer}{mlp}down_proj.weight"] = (d, width)
        if i >= 3:
            out |= {f"{layer}mlp.gate.weight": (256, d), f"{layer}mlp.gate.e_score_correction_bias": (256,)}
    last = "model.layers.61."
    out |= {f"{last}{norm}.weight": (d,) for norm in ("enorm", "hnorm", "shared_head.norm")}
    out |= {f"{last}{copy}.weight": (129280, d) for copy in ("embed_tokens", "shared_head.head")}
    return out | {f"{last}eh_proj.weight": (d, 2 * d)}


def test_a_671b_index_maps_with_nothing_left_over():
    config = load_recipe("v3-671b").model
    layout, index = Layout(config), released_index(config)
    assert layout.places.keys() == index.keys()
    assert all(layout.shape(name) == shape for name, shape in index.items())

    filled: dict[str, int] = {}
    for name in layout.originals():
        place = layout.places[name]
        filled[place.name] = filled.get(place.name, 0) + math.prod(index[name])
    assert all(count == math.prod(layout.shape(name)) for name, count in filled.items())
    biases = sum(count for name, count in filled.items() if name.endswith(CORRECTION_BIAS))
    assert biases == 59 * 256
    trunk = sum(count for name, count in filled.items() if ".61." not in name) - 58 * 256
    assert trunk == 671_026_404_352


def test_every_part_of_a_stack_is_named_once(tiny_config):
    layout = Layout(tiny_config())
    for stack, names in layout.stacks.items():
        places = [layout.places[name] for name in names]
        assert {p.name for p in places} == {stack} and len(set(places)) == len(places)
        assert sum(math.prod(layout.shape(name)) for name in names) == math.prod(layout.shape(stack))


DEEPSEEK_KEYS = {
    "architectures": ["DeepseekV3ForCausalLM"], "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "bos_token_id": 163584, "ep_size": 1,
    "hidden_act": "silu", "initializer_range": 0.02, "kv_lora_rank": 512, "moe_layer_freq": 1, "norm_topk_prob": True,
    "num_nextn_predict_layers": 0, "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rope_theta": 50000.0, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.48.3", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 163840, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
MOONLIGHT = {
    "model_type": "deepseek_v3", "eos_token_id": 163585, "hidden_size": 2048, "intermediate_size": 11264,
    "max_position_embeddings": 8192, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "q_lora_rank": None, "rms_norm_eps": 1e-5, "rope_scaling": None, "routed_scaling_factor": 2.446,
}  # fmt: skip
KIMI_K2 = {
    "model_type": "kimi_k2", "eos_token_id": 163586, "hidden_size": 7168, "intermediate_size": 18432,
    "max_position_embeddings": 131072, "moe_intermediate_size": 2048, "n_routed_experts": 384, "n_shared_experts": 1,
    "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 64,
    "q_lora_rank": 1536, "rms_norm_eps": 1e-6, "routed_scaling_factor": 2.827,
    "rope_scaling": {
        "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("own", "shapes", "billions"),
    [
        (
            MOONLIGHT,
            {
                "model.layers.0.self_attn.q_proj.weight": (16 * 192, 2048),
                "model.layers.0.mlp.down_proj.weight": (2048, 11264),
                "model.layers.26.mlp.experts.63.gate_proj.weight": (1408, 2048),
                "model.layers.26.mlp.shared_experts.up_proj.weight": (2 * 1408, 2048),
            },
            15.96,
        ),
        (
            KIMI_K2,
            {
                "model.layers.0.self_attn.q_b_proj.weight": (64 * 192, 1536),
                "model.layers.60.self_attn.kv_b_proj.weight": (64 * 256, 512),
                "model.layers.60.mlp.experts.383.down_proj.weight": (7168, 2048),
                "model.layers.60.mlp.gate.weight": (384, 7168),
            },
            1026.4,
        ),
    ],
    ids=["Moonlight-16B-A3B", "Kimi K2"],
)
def test_relatives_have_every_shape_from_their_config_alone(own, shapes, billions):
    config = model_config_from_hf(DEEPSEEK_KEYS | own)
    assert inverse_frequencies(config).isfinite().all() and softmax_scale(config) > 0
    layout = Layout(config)
    assert {name: layout.shape(name) for name in shapes} == shapes
    held = sum(math.prod(layout.shape(name)) for name in layout.originals())
    assert held / 1e9 == pytest.approx(billions, rel=1e-3)
    biases = sum(math.prod(layout.shape(name)) for name in layout.originals() if name.endswith(CORRECTION_BIAS))
    assert weights_in(config) == held - biases
    assert not any(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in layout.places)
