"""Hugging Face layout: transformers loads what we write, we load what transformers writes, and all of it survives."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from baleen.config import LongRope, RopeScaling
from baleen.interop.huggingface import load_model, save_model

YARN = RopeScaling(factor=40.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
VARIANTS = {
    "v3": {},
    "no q_lora": {"q_lora_rank": None},
    "tied": {"tie_word_embeddings": True},
    "one group, two shared": {"n_group": 1, "topk_group": 1, "n_shared_experts": 2},
    "no mtp, no shared": {"num_nextn_predict_layers": 0, "n_shared_experts": 0},
    "yarn": {"rope_scaling": YARN},
    "yarn without mscale": {"rope_scaling": RopeScaling(factor=4.0, original_max_position_embeddings=16)},
    "halves, bias": {"rope_interleave": False, "attention_bias": True},
    "longrope": {
        "rope_theta": 1.0,
        "rope_scaling": LongRope(
            original_max_position_embeddings=256,
            short_factor=(1.0, 3.5, 7.25, 90.0),
            long_factor=(1.0, 3.5, 7.25, 90.0),
        ),
    },
    "all dense": {"first_k_dense_replace": 4},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_transformers_loads_it_and_computes_the_same(tmp_path, tiny_model, same, changes):
    model = tiny_model(**changes)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(3))
    save_model(model, tmp_path / "model")
    theirs, info = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    shared = "shared_experts"  # without shared experts transformers makes empty ones, [0, d]
    assert {n for n in info["missing_keys"] if shared not in n or model.config.n_shared_experts} == set()
    assert info["mismatched_keys"] == set() and not info["error_msgs"]
    assert all(int(n.split(".")[2]) >= model.config.num_hidden_layers for n in info["unexpected_keys"])
    ids = torch.arange(40).view(2, 20) * 7 % 97
    with torch.no_grad():
        ours, reference = model.logits(model(ids).hidden_BTd), theirs.eval()(ids).logits
    assert (ours - reference).abs().max() <= 2e-5 * reference.abs().max()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_identical(tmp_path, tiny_model, same, changes, dtype):
    model = tiny_model(**changes)
    save_model(model, tmp_path / "one", dtype=dtype)
    loaded = load_model(tmp_path / "one")
    assert loaded.model.norm.weight.dtype == dtype
    assert all(g.e_score_correction_bias.dtype == torch.float32 for g in loaded.gates)
    assert loaded.config.tie_word_embeddings == (loaded.lm_head.weight is loaded.model.embed_tokens.weight)
    save_model(loaded, tmp_path / "two")
    assert same(loaded, load_model(tmp_path / "two"))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    if dtype == torch.float32:
        assert same(model, loaded)


def test_shards_hold_the_same_as_one_file(tmp_path, tiny_model, same):
    model = tiny_model()
    save_model(model, tmp_path / "model", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 5 and set(index["weight_map"].values()) == set(shards)
    assert same(load_model(tmp_path / "model"), model)
    ids = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.allclose(theirs(ids).logits, model.logits(model(ids).hidden_BTd), atol=1e-4)


def test_what_transformers_writes_is_read(tmp_path, tiny_model, same):
    model = tiny_model(num_nextn_predict_layers=0)
    save_model(model, tmp_path / "ours")
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.config.num_nextn_predict_layers = 0
    theirs.save_pretrained(tmp_path / "theirs")
    assert same(load_model(tmp_path / "theirs").float(), model)


def test_config_says_what_other_engines_need(tmp_path, tiny_model, same):
    save_model(tiny_model(), tmp_path / "model", dtype=torch.bfloat16, generation={"temperature": 0.6})
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert (config["scoring_func"], config["topk_method"], config["torch_dtype"]) == ("sigmoid", "noaux_tc", "bfloat16")
    generation = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6}


def test_saving_replaces_a_model_and_a_failed_save_keeps_it(tmp_path, tiny_model, same):
    save_model(tiny_model(seed=0), tmp_path / "model")
    second = tiny_model(seed=1)
    save_model(second, tmp_path / "model")
    assert same(load_model(tmp_path / "model"), second)

    class FullDisk:
        def save(self, directory):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_model(tiny_model(seed=2), tmp_path / "model", tokenizer=FullDisk())
    assert same(load_model(tmp_path / "model"), second)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
