"""GGUF out: llama.cpp computes what we compute, and what it would compute wrongly is refused."""

import json

import gguf
import numpy as np
import pytest
import torch

from baleen.config import LongRope, RopeScaling, UserError
from baleen.data.tokenizer_training import train_tokenizer
from baleen.interop.convert import export_checkpoint
from baleen.interop.gguf_file import GGUFFile
from baleen.interop.huggingface import save_model
from baleen.interop.load import load

TEXT = "the whale and the krill, 12 of them (all 'small')\n"
VARIANTS = {
    "v3": {},
    "no q_lora": {"q_lora_rank": None},
    "tied": {"tie_word_embeddings": True},
    "halves": {"rope_interleave": False},
    "another epsilon": {"rms_norm_eps": 1e-2},
    "yarn": {
        "rope_scaling": RopeScaling(factor=40.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
    },
    "yarn, half": {
        "rope_scaling": RopeScaling(
            factor=9.0,
            original_max_position_embeddings=16,
            mscale=0.5,
            mscale_all_dim=0.5,
            beta_fast=8.0,
            beta_slow=2.0,
        )
    },
    "one group, two shared": {"n_group": 1, "topk_group": 1, "n_shared_experts": 2},
    "gates not normed": {"norm_topk_prob": False},
    "all dense": {"first_k_dense_replace": 4},
    "every group": {"n_group": 4, "topk_group": 4},
    "one expert": {
        "first_k_dense_replace": 4, "n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1
    },
}  # fmt: skip


@pytest.fixture
def exported(tmp_path, tiny_model):
    """Makes tmp_path/model of a random model with a tokenizer, and tmp_path/model.gguf; returns model and tokenizer."""

    def make(dtype=None, tokenizer=None, **changes):
        model = tiny_model(**{"vocab_size": 300} | changes)
        tokenizer = tokenizer or train_tokenizer([TEXT * 20], 290)
        save_model(model, tmp_path / "model", tokenizer=tokenizer)
        export_checkpoint(tmp_path / "model", tmp_path / "model.gguf", to="gguf", dtype=dtype)
        return model, tokenizer

    return make


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("f32", 0.0), ("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 8e-3), ("q4_1", 0.07)]
)
def test_tensors_by_the_library_itself(tmp_path, exported, dtype, tolerance):
    model, _ = exported(dtype, hidden_size=64, kv_lora_rank=32, moe_intermediate_size=32, num_attention_heads=2)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    layer = model.model.layers[1]
    w_HXR = layer.self_attn.kv_b_proj.weight.unflatten(0, (2, -1))
    expected = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
        "blk.1.attn_k_b.weight": w_HXR[:, :12].transpose(1, 2),
        "blk.1.attn_v_b.weight": w_HXR[:, 12:],
        "blk.1.exp_probs_b.bias": layer.mlp.gate.e_score_correction_bias,
        "blk.1.ffn_gate_exps.weight": layer.mlp.experts.gate_up_proj[:, :32],
        "blk.1.ffn_up_exps.weight": layer.mlp.experts.gate_up_proj[:, 32:],
        "blk.1.ffn_down_exps.weight": layer.mlp.experts.down_proj,
    }
    for name, tensor in expected.items():
        assert tensors[name].shape == tensor.shape
        assert (tensors[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name
    assert not any(name.startswith("blk.3.") for name in tensors)  # the MTP layer stays behind
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.1.ffn_up_exps.weight"] == dtype.upper() and kinds["blk.1.ffn_gate_inp.weight"] == "F32"
    assert kinds["blk.1.attn_k_b.weight"] == ("F16" if dtype.startswith("q") else dtype.upper())  # rows of 12


def test_template_and_special_tokens(tmp_path, exported):
    _, tokenizer = exported()
    fields = GGUFFile(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"] == "deepseek-v3" and fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    assert fields["tokenizer.ggml.tokens"][290:] == [f"[UNUSED_{id}]" for id in range(290, 300)]
    assert "generation" not in fields["tokenizer.chat_template"].replace("add_generation_prompt", "")


def test_deepseeks_own_kind_of_tokenizer_json(tmp_path, tiny_model):
    """An empty sequence of normalizers, V3's groups of digits, and a bos that tokenizer_config.json alone announces."""
    save_model(tiny_model(vocab_size=290), tmp_path / "model", tokenizer=train_tokenizer([TEXT * 20], 290))
    file, settings = tmp_path / "model/tokenizer.json", tmp_path / "model/tokenizer_config.json"
    description, config = json.loads(file.read_text()), json.loads(settings.read_text())
    description["normalizer"] = {"type": "Sequence", "normalizers": []}
    description["post_processor"] = {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True
    }  # fmt: skip
    description["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,3}"
    file.write_text(json.dumps(description))
    for said in (True, False):
        settings.write_text(json.dumps(config | {"add_bos_token": said}))
        export_checkpoint(tmp_path / "model", tmp_path / f"{said}.gguf", to="gguf")
        fields = GGUFFile(tmp_path / f"{said}.gguf").fields
        assert fields["tokenizer.ggml.add_bos_token"] is said and fields["tokenizer.ggml.pre"] == "deepseek-v3"
    file.write_text(json.dumps(description | {"normalizer": {"type": "NFC"}}))
    with pytest.raises(UserError, match="no byte-level BPE"):
        export_checkpoint(tmp_path / "model", tmp_path / "nfc.gguf", to="gguf")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"attention_bias": True}, "biases"),
        ({"n_shared_experts": 0}, "shared experts"),
        ({"rope_theta": 1.0, "rope_scaling": "longrope"}, "longrope"),
        ({"rope_scaling": "two mscales"}, "mscale"),
        ({"rope_scaling": "no mscale"}, "mscale"),
        ({"num_hidden_layers": 27}, "27 layers"),
        ({"n_routed_experts": 516, "n_group": 1, "topk_group": 1}, "at most 512"),
        ({"vocab_size": 280}, "290 tokens"),
    ],
)
def test_what_llama_cpp_would_compute_wrongly_is_refused(tmp_path, exported, changes, word):
    scalings = {
        "longrope": LongRope(original_max_position_embeddings=256, short_factor=(1.0,) * 4, long_factor=(1.0,) * 4),
        "no mscale": RopeScaling(factor=4.0, original_max_position_embeddings=16),
        "two mscales": RopeScaling(factor=40.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.5),
    }
    if "rope_scaling" in changes:
        changes = {**changes, "rope_scaling": scalings[changes["rope_scaling"]]}
    with pytest.raises(UserError, match=word):
        exported(**changes)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_bad_names_values_and_dtypes(tmp_path, exported):
    exported()
    before = (tmp_path / "model.gguf").read_bytes()
    for out, dtype, word in [("model.gguf", None, "exists"), ("new", None, r"\.gguf"), ("new.gguf", "int3", "int3")]:
        with pytest.raises(UserError, match=word):
            export_checkpoint(tmp_path / "model", tmp_path / out, to="gguf", dtype=dtype)
    (tmp_path / "model" / "tokenizer.json").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        export_checkpoint(tmp_path / "model", tmp_path / "new.gguf", to="gguf")
    assert (tmp_path / "model.gguf").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["away", "model", "model.gguf"]


@pytest.mark.parametrize(("dtype", "value"), [("f16", 1e6), ("q8_0", 1e7), ("q4_1", 1e5)])
def test_a_type_must_hold_every_value(tmp_path, tiny_model, dtype, value):
    model = tiny_model(vocab_size=290)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = value
    save_model(model, tmp_path / "model", tokenizer=train_tokenizer([TEXT * 20], 290))
    with pytest.raises(UserError, match=rf"blk\.0\.ffn_up.*{dtype}"):
        export_checkpoint(tmp_path / "model", tmp_path / "m.gguf", to="gguf", dtype=dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def llama_cpp(tmp_path):
    """Opens tmp_path/model.gguf with a cache in float32: its float16 one alone would move logits by 6e-4."""
    library = pytest.importorskip("llama_cpp")
    opened = []

    def open_file():
        opened.append(
            library.Llama(
                str(tmp_path / "model.gguf"), n_ctx=256, logits_all=True, type_k=0, type_v=0, flash_attn=False,
                n_threads=1, verbose=False,
            )
        )  # fmt: skip
        return opened[-1]

    yield open_file
    for model in opened:
        model.close()


def greedy_by_us(model, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.logits(model(torch.tensor([ids])).hidden_BTd[:, -1]).argmax()))
    return ids[-count:]


def greedy_by_llama_cpp(engine, ids: list[int], count: int) -> list[int]:
    out: list[int] = []
    engine.eval(ids)
    for _ in range(count):
        out.append(int(np.argmax(engine.scores[engine.n_tokens - 1])))
        engine.eval(out[-1:])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_llama_cpp_computes_the_same_logits_and_tokens(exported, llama_cpp, changes):
    model, tokenizer = exported(**changes)
    engine = llama_cpp()
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXT * 2)]
    assert engine.tokenize((TEXT * 2).encode()) == ids
    with torch.no_grad():
        reference = model.logits(model(torch.tensor([ids])).hidden_BTd)[0]
    engine.eval(ids)
    logits = torch.from_numpy(np.array(engine.scores[: len(ids)]))
    assert (logits - reference).abs().max() <= 1e-5 * reference.abs().max()
    engine.reset()
    assert greedy_by_llama_cpp(engine, ids, 64) == greedy_by_us(model, ids, 64)


@pytest.mark.slow
def test_llama_cpp_splits_text_as_we_do(exported, llama_cpp):
    _, tokenizer = exported(vocab_size=400, tokenizer=train_tokenizer([TEXT * 20, "a  b   c 「鯨」とkrill 鯨鯨"], 300))
    engine = llama_cpp()
    for text in (TEXT, "a  5\n\n  12345 'tis don't (hello) _x", "鯨とwhale 鯨12", "नमस्ते ❤️ \u200d!", "\t x\r\n\r\n y "):
        assert engine.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text)
    control = engine.tokenize(b"<|user|>x", add_bos=False, special=True)
    assert [control] == tokenizer.encode_batch(["<|user|>x"], allow_special=True)


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({"n_group": 4, "topk_group": 2}, (4, 2)),
        (VARIANTS["every group"], (1, 1)),  # of several groups llama.cpp wants some left out
        (VARIANTS["one expert"], (None, None)),  # and fewer groups than experts
    ],
)
def test_groups_as_llama_cpp_asserts_them(tmp_path, exported, changes, groups):
    model, _ = exported(**changes)
    fields = GGUFFile(tmp_path / "model.gguf").fields
    assert tuple(fields.get(f"deepseek2.expert_group_{name}") for name in ("count", "used_count")) == groups
    back = load(tmp_path / "model.gguf").model.config
    assert back.n_routed_experts == model.config.n_routed_experts and back.topk_group <= back.n_group


def test_the_name_of_a_split_decides_how_whole_words_are_taken(tmp_path, tiny_model):
    """llama.cpp takes a word of the vocabulary without merging it for llama-bpe, and for no other."""
    save_model(tiny_model(vocab_size=290), tmp_path / "model", tokenizer=train_tokenizer([TEXT * 20], 290))
    file = tmp_path / "model/tokenizer.json"
    description = json.loads(file.read_text())
    description["model"]["ignore_merges"] = True
    file.write_text(json.dumps(description))
    with pytest.raises(UserError, match="splits text as llama.cpp cannot"):
        export_checkpoint(tmp_path / "model", tmp_path / "whole.gguf", to="gguf")
