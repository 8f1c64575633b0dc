"""Upcycling changes the architecture and not the function, through our model and through transformers'."""

import json

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from baleen.config import UserError
from baleen.data.tokenizer_training import train_tokenizer
from baleen.interop.checkpoint import Checkpoint
from baleen.interop.huggingface import load_model
from baleen.interop.latent import norm_constants, plain_theta
from baleen.interop.llama import open_llama
from baleen.interop.upcycle import upcycle, upcycled_config

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}


@pytest.fixture
def llama(tmp_path):
    """Makes a random Llama with its tokenizer in tmp_path/llama; returns it."""

    def make(**changes) -> LlamaForCausalLM:
        settings = {
            "vocab_size": 290, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "head_dim": 16,
            "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
            "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2,
        }  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.normal_(1.0, 0.2)
        model.save_pretrained(tmp_path / "llama")
        train_tokenizer(["the whale and the krill " * 20], 290).save(tmp_path / "llama")
        return model

    return make


def furthest(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return float((logits - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({}, {"experts": 2, "slices": 4, "shared": 2, "mtp": 1}),
        ({}, {"experts": 3, "slices": 1, "shared": 0}),
        ({"num_key_value_heads": 1, "tie_word_embeddings": True}, {"experts": 4, "slices": 2, "shared": 1}),
        ({"num_key_value_heads": 6, "rope_parameters": LLAMA3}, {"mtp": 2}),
        ({"num_key_value_heads": 2, "head_dim": 8}, {"experts": 1, "slices": 3}),
        ({"rope_parameters": LINEAR}, {}),
    ],
    ids=[
        "dense",
        "experts",
        "whole copies",
        "one key head, tied",
        "llama3 rope, every head its own",
        "small heads",
        "linear rope",
    ],  # fmt: skip
)
def test_logits_equal_the_sources(tmp_path, llama, changes, options):
    source = llama(**changes)
    upcycle(tmp_path / "llama", tmp_path / "v3", **options)
    ours = load_model(tmp_path / "v3")
    theirs, info = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "v3", output_loading_info=True)
    ids = torch.randint(290, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        reference = source(ids).logits
        assert furthest(ours.logits(ours(ids).hidden_BTd), reference) <= 1e-4
        assert furthest(theirs.eval()(ids).logits, reference) <= 1e-4
    assert all("shared_experts" in name for name in info["missing_keys"]) and not info["mismatched_keys"]
    frequencies = source.model.rotary_emb.inv_freq.repeat(source.config.num_key_value_heads)
    torch.testing.assert_close(ours.model.rotary.inv_freq, frequencies, rtol=0 if not changes else 2e-7, atol=0)
    assert len(ours.mtp_layers) == options.get("mtp", 0)


def test_every_token_goes_to_one_whole_copy(tmp_path, llama):
    llama()
    upcycle(tmp_path / "llama", tmp_path / "v3", experts=2, slices=4, shared=2)
    model = load_model(tmp_path / "v3")
    routings = model(torch.randint(290, (1, 100), generator=torch.Generator().manual_seed(1))).routings
    for routing in routings:
        copies = routing.indices_NK // 4
        assert (copies == copies[:, :1]).all() and (routing.weights_NK == 1).all()
        assert torch.equal(routing.indices_NK.sort(-1).values % 4, torch.arange(4).expand(100, 4))
    assert any(0 < routing.load()[0] < 100 for routing in routings)


def test_bf16_keeps_selections_and_constants(tmp_path, llama):
    source = llama()
    upcycle(tmp_path / "llama", tmp_path / "v3", dtype="bf16")
    assert Checkpoint(tmp_path / "v3").dtype == torch.bfloat16
    for parameter in source.parameters():
        parameter.data = parameter.data.bfloat16().float()
    ids = torch.arange(100)[None]
    model = load_model(tmp_path / "v3", dtype=torch.float32)
    with torch.no_grad():
        assert furthest(model.logits(model(ids).hidden_BTd), source(ids).logits) <= 1e-4


def test_constants_have_mean_square_one():
    assert norm_constants(192) == [13, 5]
    for rank in (8, 16, 24, 48, 64, 128, 320, 512, 1024):
        constants = norm_constants(rank)
        assert sum(c * c for c in constants) == rank + len(constants) and min(constants) > 0


def with_a_constant(source, directory) -> None:
    """Every hidden state has one coordinate in common, as trained models' nearly have; the portable form needs it."""
    with torch.no_grad():
        source.model.embed_tokens.weight[:, 0] = 3.0
        for name, parameter in source.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[0] = 0.0
    source.save_pretrained(directory)


@pytest.mark.parametrize(("portable", "rank"), [(False, 40), (True, None), (True, 40)])
def test_other_forms_are_one_function_here_and_in_transformers(tmp_path, llama, portable, rank):
    with_a_constant(llama(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}), tmp_path / "llama")
    upcycle(tmp_path / "llama", tmp_path / "v3", portable=portable, value_rank=rank, slices=2, experts=2)
    ours = load_model(tmp_path / "v3")
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "v3").eval()
    ids = torch.randint(290, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert furthest(ours.logits(ours(ids).hidden_BTd), theirs(ids).logits) <= 2e-4
    config = ours.config
    assert config.kv_lora_rank == (rank or 48) + (1 if portable else len(norm_constants(40)))
    assert (config.rope_theta, config.attention_bias) == ((5000.0, False) if portable else (1.0, True))


def test_values_of_low_rank_are_kept_by_that_rank(tmp_path, llama):
    source = llama()
    with torch.no_grad():
        for layer in source.model.layers:  # 20 of 48 coordinates, whatever the input
            weight = layer.self_attn.v_proj.weight
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_(u[:, :20] @ torch.diag(s[:20]) @ v[:20])
    source.save_pretrained(tmp_path / "llama")
    ids = torch.randint(290, (2, 100), generator=torch.Generator().manual_seed(1))
    upcycle(tmp_path / "llama", tmp_path / "20", value_rank=20)
    upcycle(tmp_path / "llama", tmp_path / "12", value_rank=12)
    with torch.no_grad():
        reference = source(ids).logits
        logits = [m.logits(m(ids).hidden_BTd) for m in (load_model(tmp_path / name) for name in ("20", "12"))]
    assert furthest(logits[0], reference) <= 1e-3 < 0.05 < furthest(logits[1], reference)


def test_one_key_head_keeps_its_rope_in_the_portable_form(tmp_path, llama):
    """Then only the constant is approximated, and keys are the source's but for one factor a pair."""
    source = llama(num_key_value_heads=1)
    with_a_constant(source, tmp_path / "llama")
    upcycle(tmp_path / "llama", tmp_path / "v3", portable=True)
    model, layer = load_model(tmp_path / "v3"), source.model.layers[0].self_attn
    attention = model.model.layers[0].self_attn
    assert torch.equal(model.model.rotary.inv_freq, source.model.rotary_emb.inv_freq)
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(source.model.embed_tokens(torch.arange(100)))
        ours = attention.kv_a_proj_with_mqa(x)[:, -16:].unflatten(-1, (8, 2)).norm(dim=-1)
        theirs = layer.k_proj(x).unflatten(-1, (2, 8)).norm(dim=1)
    factors = ours / theirs
    assert (factors.std(0) / factors.mean(0)).max() <= 1e-3


def test_portable_and_ranks_that_cannot_be(tmp_path, llama):
    llama(rope_parameters=LLAMA3)
    for options, words in [({"portable": True}, "plain rope"), ({"value_rank": 49}, "48"), ({"value_rank": 0}, "48")]:
        with pytest.raises(UserError, match=words):
            upcycle(tmp_path / "llama", tmp_path / "v3", **options)
    assert not (tmp_path / "v3").exists()
    for theta in (10000.0, 100000.0, 500000.0, 1e6):
        assert plain_theta(1.0 / theta ** (torch.arange(0, 64, 2).float() / 64)) == theta


def test_what_the_form_cannot_express_is_refused(tmp_path, llama):
    llama()
    config = tmp_path / "llama/config.json"
    plain = json.loads(config.read_text())
    for changes, options, word in [
        ({"model_type": "qwen3"}, {}, "norms of queries"),
        ({"model_type": "gpt2"}, {}, "gpt2"),
        ({"attention_bias": True}, {}, "bias"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, {}, "yarn"),
        ({"num_hidden_layers": 4}, {}, "lacks"),
        ({"partial_rotary_factor": 0.5}, {}, "part of each head"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, {}, "rope: factor: Field required"),
        ({"rope_parameters": LLAMA3 | {"factor": "8"}}, {}, "rope: factor: Input should be a valid number"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1}}, {}, "must be below high_freq_factor"),
        ({"rope_parameters": {"rope_theta": 1e29, "rope_type": "linear", "factor": 1e29}}, {}, "not positive"),
        ({"hidden_size": "48"}, {}, "hidden_size: Input should be a valid integer"),
        ({"eos_token_id": []}, {}, "eos_token_id"),
        ({"eos_token_id": 290}, {}, "outside the vocabulary"),
        ({"num_hidden_layers": 2}, {}, "does not have"),
        ({"intermediate_size": 64}, {}, "shape"),
        ({}, {"experts": 2, "slices": 5}, "does not divide"),
        ({}, {"experts": 2}, "slices"),
        ({}, {"dtype": "fp16"}, "fp16"),
    ]:
        config.write_text(json.dumps(plain | changes))
        with pytest.raises(UserError, match=word):
            upcycle(tmp_path / "llama", tmp_path / "v3", **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]
    with pytest.raises(UserError, match="neither"):
        open_llama(tmp_path / "nowhere")


def test_every_end_token_sampling_and_licences_are_kept(tmp_path, llama):
    llama(eos_token_id=[1, 5])
    source = tmp_path / "llama"
    written = json.loads((source / "generation_config.json").read_text())
    assert written["eos_token_id"] == [1, 5]
    for name in ("LICENSE-MODEL", "LICENSE-CODE", "NOTICE.txt"):
        (source / name).write_text(name)
    upcycle(source, tmp_path / "one")
    generation = json.loads((tmp_path / "one/generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, [1, 5])
    assert load_model(tmp_path / "one").config.eos_token_id == 1
    assert {p.name for p in (tmp_path / "one").glob("[LN]*")} == {"LICENSE-MODEL", "LICENSE-CODE", "NOTICE.txt"}

    said = {"eos_token_id": [1, 5, 9], "bos_token_id": 0, "temperature": 0.6, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(said | {"_from_model_config": True}))
    upcycle(source, tmp_path / "two")
    assert json.loads((tmp_path / "two/generation_config.json").read_text()) == said
    (source / "generation_config.json").unlink()
    upcycle(source, tmp_path / "three")
    assert json.loads((tmp_path / "three/generation_config.json").read_text())["eos_token_id"] == [1, 5]
    (source / "generation_config.json").write_text('{"eos_token_id": "stop"}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id"):
        open_llama(source)


def test_a_llama_in_shards(tmp_path, llama):
    source = llama()
    folder = tmp_path / "llama"
    (folder / "model.safetensors").unlink()
    source.save_pretrained(folder, max_shard_size="50KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    read = open_llama(folder).read
    assert all(torch.equal(read(name), tensor) for name, tensor in source.state_dict().items())
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(UserError, match=rf"{shards[1].name} repeats model\..*, which {shards[0].name} holds"):
        open_llama(folder)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 300), st.floats(), st.text(max_size=4),
    st.lists(st.integers(-1, 300), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([10**40, -(10**400), 1e308, 2**31 - 1, 5e-324]),
)  # fmt: skip
ROPE_KEYS = sorted({*LLAMA3, "type", "partial_rotary_factor"})
ROPE = st.dictionaries(st.sampled_from(ROPE_KEYS), JUNK, max_size=3).map(lambda changes: LLAMA3 | changes)


def test_any_config_json_is_read_or_refused(tmp_path, llama):
    llama()
    file = tmp_path / "llama/config.json"
    plain, read = json.loads(file.read_text()), []
    values = {key: JUNK for key in (*plain, "rope_scaling", "rope_theta", "partial_rotary_factor")}
    values |= {"rope_parameters": ROPE | JUNK, "rope_scaling": ROPE | JUNK}

    @settings(max_examples=500, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(values)).flatmap(lambda key: st.tuples(st.just(key), values[key])))
    @example(("model_type", []))
    def attempt(change):
        file.write_text(json.dumps(plain | dict([change])))
        try:
            upcycled_config(open_llama(tmp_path / "llama"), mtp=1)
            read.append(change)
        except UserError as error:
            assert str(error).strip() and "\n" not in str(error)

    attempt()
    assert 20 < len(read) < 400  # nulls and numbers that may be; the others are refused
