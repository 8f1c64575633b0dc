"""The vocabulary: whatever a user writes is a valid configuration, or one sentence that says what is wrong."""

import json

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from baleen.config import (
    LongRope,
    ModelConfig,
    RopeScaling,
    UserError,
    model_config_from_hf,
    model_config_to_hf,
    read_json,
)
from baleen.model.transformer import Transformer
from baleen.train.loss import training_loss

THOUSAND = settings(max_examples=1000, suppress_health_check=list(HealthCheck))
SMALL = {
    "vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 4, "num_hidden_layers": 2,
    "num_attention_heads": 2, "q_lora_rank": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2,
    "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "max_position_embeddings": 16,
}  # fmt: skip
SHAPES = [key for key in (*SMALL, "n_shared_experts", "num_nextn_predict_layers")]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def is_one_sentence(error: UserError) -> bool:
    text = str(error)
    return bool(text.strip()) and "\n" not in text


@THOUSAND
@given(st.dictionaries(st.sampled_from(SHAPES), st.integers(-1, 9), max_size=6))
@example({"n_routed_experts": 1, "n_group": 1, "num_experts_per_tok": 1, "topk_group": 1})
@example({"first_k_dense_replace": 3, "num_nextn_predict_layers": 1})
def test_any_shape_computes_or_is_refused(overrides):
    try:
        config = load_model({**SMALL, **overrides})
    except UserError as error:
        assert is_one_sentence(error)
        return
    model = Transformer(config)
    model.init_weights(0)
    tokens = torch.zeros(1, 3 + config.num_nextn_predict_layers, dtype=torch.long)
    loss = training_loss(model, tokens, mtp_loss_weight=0.3, balance_loss_weight=0.1 if model.gates else 0.0)
    assert loss.total.isfinite() and len(loss.loads) == len(model.gates)


def load_model(keys) -> ModelConfig:
    return model_config_from_hf({"model_type": "deepseek_v3", **keys})


def test_both_outcomes_are_tried():
    load_model(SMALL)
    with pytest.raises(UserError):
        load_model({**SMALL, "n_group": 3})


JUNK = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([10**40, -(10**400), 1e308, 0, ""]),
)  # fmt: skip
MODEL_KEYS = st.sampled_from(sorted(ModelConfig.model_fields)) | st.text(max_size=6)


@THOUSAND
@given(st.dictionaries(MODEL_KEYS, JUNK, min_size=1, max_size=3))
@example({"n_routed_experts": 10**40})
@example({"n_routed_experts": 2**61 - 1})
@example({"rope_scaling": [1]})
@example({"rope_scaling": {"type": []}})
@example({"eos_token_id": []})
@example({"eos_token_id": [None]})
def test_any_config_json_is_read_or_refused(junk):
    try:
        config = load_model({**SMALL, **junk})
    except UserError as error:
        assert is_one_sentence(error)
    else:
        assert model_config_from_hf(json.loads(json.dumps(model_config_to_hf(config)))) == config


def test_a_scale_that_the_weights_hold_is_neither_exported_nor_read():
    """Where another engine's config.json has it, it belongs to the function."""
    assert "mla_scale_lora" not in model_config_to_hf(ModelConfig(**SMALL, mla_scale_lora=True))
    with pytest.raises(UserError, match="mla_scale_lora"):
        load_model({**SMALL, "mla_scale_lora": True})


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"n_routed_experts": 10, "n_group": 4}, "take n_group = 5"),
        ({"topk_group": 3}, "lower topk_group"),
        ({"n_routed_experts": 4, "n_group": 4}, "at most n_routed_experts / 2 = 2"),
        ({"num_experts_per_tok": 3}, "above the group limit: 1 groups of 2 experts hold 2"),
        ({"qk_rope_head_dim": 3}, "rotary pairs need an even number"),
        ({"first_k_dense_replace": 9}, "larger than the number of layers"),
        ({"eos_token_id": 20}, "outside the vocabulary of 20"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": 10**18}, "vocab_size"),
        ({"rope_theta": 1.0, "rope_scaling": YARN}, "wavelengths"),
        ({"rope_scaling": {**YARN, "beta_fast": 0}}, "beta_fast"),
        ({"scoring_func": "softmax"}, "Baleen builds only 'sigmoid'"),
        ({"model_type": "llama"}, "Baleen loads 'deepseek_v3'"),
        ({"sliding_window": 5}, "keys that Baleen does not know: 'sliding_window'"),
    ],
)
def test_impossible_models_say_why(keys, said):
    with pytest.raises(UserError) as caught:
        load_model({**SMALL, **keys})
    assert said in str(caught.value) and is_one_sentence(caught.value)


# --- config.json


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig(q_lora_rank=None, n_shared_experts=0, num_nextn_predict_layers=3, tie_word_embeddings=True),
        ModelConfig(rope_scaling=RopeScaling(factor=40.0, original_max_position_embeddings=4096)),
        ModelConfig(
            rope_scaling=RopeScaling(factor=40, original_max_position_embeddings=4096, mscale=1, mscale_all_dim=1)
        ),
        ModelConfig(
            qk_rope_head_dim=4,
            rope_theta=1.0,
            rope_scaling=LongRope(original_max_position_embeddings=9, short_factor=(1.0, 2.0), long_factor=(1.0, 2.0)),
        ),
    ],
)
def test_hugging_face_round_trip(config):
    raw = json.loads(json.dumps(model_config_to_hf(config)))
    assert model_config_from_hf(raw) == config
    assert (raw["scoring_func"], raw["topk_method"], raw["moe_layer_freq"]) == ("sigmoid", "noaux_tc", 1)


def test_old_and_new_spelling_of_rope_are_one():
    old = {**SMALL, "rope_theta": 5e4, "rope_scaling": {**YARN, "type": "yarn"}}
    del old["rope_scaling"]["rope_type"]
    new = {**SMALL, "rope_parameters": {**YARN, "rope_theta": 5e4}}
    assert load_model(old) == load_model(new)
    config = load_model(old)
    assert isinstance(config.rope_scaling, RopeScaling) and config.rope_scaling.factor == 4.0
    assert config.rope_theta == 5e4


def test_plain_rope_in_both_spellings():
    assert load_model({**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}).rope_theta == 5e4
    assert load_model({**SMALL, "rope_theta": 5e4, "rope_scaling": None}).rope_scaling is None


def test_nulls_of_config_json():
    config = load_model({**SMALL, "n_group": None, "topk_group": None, "n_shared_experts": None, "q_lora_rank": None})
    assert (config.n_group, config.topk_group, config.n_shared_experts, config.q_lora_rank) == (1, 1, 0, None)


def test_names_of_the_mtp_depth():
    assert load_model({**SMALL, "num_mtp_layers": 2}).num_nextn_predict_layers == 2
    assert load_model(SMALL).num_nextn_predict_layers == 0  # absent: whoever has MTP layers says so
    both = {**SMALL, "num_mtp_layers": 2, "num_nextn_predict_layers": 0}
    assert load_model(both).num_nextn_predict_layers == 0


def test_of_several_eos_the_first():
    assert load_model({**SMALL, "eos_token_id": [3, 4]}).eos_token_id == 3


def test_read_json(tmp_path):
    file = tmp_path / "x.json"
    with pytest.raises(UserError, match="is missing"):
        read_json(file)
    for content in (b"{", b"\xff", b"[1]", b"3"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.json"):
            read_json(file)
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}
