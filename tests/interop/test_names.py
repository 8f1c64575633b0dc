"""The name map, against the index of a 671B checkpoint: shapes only."""

import math

from baleen.interop.names import CORRECTION_BIAS, Layout
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
