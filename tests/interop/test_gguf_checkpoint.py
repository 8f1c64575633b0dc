"""`deepseek2` GGUF in: what went out comes back bit for bit, and files that are wrong are refused by name."""

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_gguf_file import KINDS, fuzz

from baleen.config import RopeScaling, UserError
from baleen.data.tokenizer_training import train_tokenizer
from baleen.interop.convert import export_checkpoint, import_checkpoint
from baleen.interop.gguf_file import GGUFFile
from baleen.interop.huggingface import load_model, save_model
from baleen.interop.load import load

TEXT = "the whale and the krill, 12 of them\n"
YARN = RopeScaling(factor=40.0, original_max_position_embeddings=16, mscale=0.707, mscale_all_dim=0.707)
V3 = {"deepseek2.block_count": 61, "deepseek2.expert_count": 256}
VARIANTS = {
    "v3": {},
    "no q_lora, tied": {"q_lora_rank": None, "tie_word_embeddings": True},
    "yarn": {"rope_scaling": YARN, "rope_theta": 50000.0},
    "one group, two shared": {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "norm_topk_prob": False},
    "all dense": {"first_k_dense_replace": 3},
}


@pytest.fixture
def exported(tmp_path, tiny_model):
    """Makes tmp_path/model and tmp_path/model.gguf of a random model; returns it."""

    def make(dtype="f32", **changes):
        model = tiny_model(**{"vocab_size": 300, "num_nextn_predict_layers": 0, "initializer_range": 0.006} | changes)
        save_model(model, tmp_path / "model", tokenizer=train_tokenizer([TEXT * 20], 290))
        export_checkpoint(tmp_path / "model", tmp_path / "model.gguf", to="gguf", dtype=dtype)
        return model

    return make


def rewritten(path, change) -> None:
    """The file again, its fields and tensors (name -> array) changed, by the library's own writer."""
    old = GGUFFile(path)
    fields, tensors = dict(old.fields), {name: old.read(name).numpy() for name in old.tensors}
    change(fields, tensors)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture"))
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_int32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_out_and_in_is_bit_identical(tmp_path, exported, same, changes):
    model = exported(**changes)
    import_checkpoint(tmp_path / "model.gguf", tmp_path / "back")
    assert same(load_model(tmp_path / "back"), model)
    export_checkpoint(tmp_path / "back", tmp_path / "again.gguf", to="gguf", dtype="f32")
    import_checkpoint(tmp_path / "again.gguf", tmp_path / "back again")
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "back again" / name).read_bytes()
    one, other = GGUFFile(tmp_path / "model.gguf"), GGUFFile(tmp_path / "again.gguf")
    assert one.fields | {"general.name": ""} == other.fields | {"general.name": ""}
    start = min(info.offset for info in one.tensors.values()), min(info.offset for info in other.tensors.values())
    assert (tmp_path / "model.gguf").read_bytes()[start[0] :] == (tmp_path / "again.gguf").read_bytes()[start[1] :]


def test_another_epsilon_comes_back_within_a_rounding(tmp_path, exported):
    model = exported(rms_norm_eps=1e-5)
    back = load(tmp_path / "model.gguf").model
    assert back.config.rms_norm_eps == 1e-5
    for (name, a), b in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-7, atol=0, msg=name)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_a_run_may_be_a_gguf_file(tmp_path, exported, dtype):
    model = exported(dtype, rope_interleave=False, hidden_size=64, kv_lora_rank=32, initializer_range=0.1)
    loaded = load(tmp_path / "model.gguf")
    ids = torch.tensor([loaded.tokenizer.encode(TEXT)])
    assert loaded.tokenizer.decode(ids[0].tolist()) == TEXT
    with torch.no_grad():
        ours, theirs = (m.logits(m(ids).hidden_BTd) for m in (model, loaded.model))
    assert (ours - theirs).abs().mean() <= 0.05 * ours.abs().mean()  # a rounded gate may choose another expert


def test_its_tokenizer_comes_back(tmp_path, exported):
    exported()
    import_checkpoint(tmp_path / "model.gguf", tmp_path / "back", dtype="bf16")
    before, after = (load(tmp_path / name).tokenizer for name in ("model", "back"))
    messages = [{"role": "user", "content": "12 krill <|user|>"}, {"role": "assistant", "content": "yes"}]
    assert after.encode_chat(messages) == before.encode_chat(messages)
    assert after.vocab_size == before.vocab_size == 290
    assert load_file(tmp_path / "back/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f, t: t.pop("blk.1.attn_k_b.weight"), "lacks blk.1.attn_k_b.weight"),
        (lambda f, t: t.update({"blk.1.attn_kv_b.weight": np.ones((2, 2))}), "blk.1.attn_kv_b.weight"),
        (lambda f, t: t.update({"output_norm.weight": np.ones(31)}), r"output_norm.weight .*\[31\].*\[32\]"),
        (lambda f, t: t["blk.2.ffn_up_exps.weight"].fill(np.nan), "blk.2.ffn_up_exps.weight .*NaN"),
        (lambda f, t: f.update({"deepseek2.expert_gating_func": 1}), "softmax"),
        (lambda f, t: f.update({"deepseek2.nextn_predict_layers": 1}), "MTP"),
        (lambda f, t: f.pop("deepseek2.expert_group_count") and f.update(V3), "8 groups"),
        (lambda f, t: f.update({"deepseek2.embedding_length": 2**30}), "more layers or weights"),
        (lambda f, t: f.update({"deepseek2.block_count": 10**6}), "more layers"),
        (lambda f, t: f.update({"deepseek2.expert_count": 60_000}), "more layers or weights"),
        (lambda f, t: f.update({"deepseek2.expert_count": 9}), "n_group"),
        (lambda f, t: f.update({"deepseek2.expert_count": "many"}), "expert_count = 'many'"),
        (lambda f, t: f.update({"deepseek2.rope.scaling.type": "linear"}), "linear"),
        (lambda f, t: f.update({"deepseek2.rope.scaling.type": "yarn"}), "yarn_log_multiplier"),
        (lambda f, t: f.update({"general.architecture": "llama"}), "baleen upcycle"),
        (lambda f, t: f.update({"general.architecture": "gpt2"}), "gpt2"),
        (lambda f, t: f.update({"tokenizer.ggml.pre": "tekken"}), "tekken"),
        (lambda f, t: f.update({"split.count": 9}), "one of 9 parts: .*--merge"),
        (lambda f, t: f.update({"tokenizer.ggml.merges": [1, 2]}), "not text"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_written(tmp_path, exported, change, words):
    exported()
    rewritten(tmp_path / "model.gguf", change)
    with pytest.raises(UserError, match=words):
        import_checkpoint(tmp_path / "model.gguf", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.gguf"]


def test_an_unknown_quantisation_is_named(tmp_path, exported):
    exported()
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    at = data.index(b"blk.0.attn_norm.weight") + len(b"blk.0.attn_norm.weight") + 4 + 8
    assert data[at] == KINDS.F32
    data[at] = 31
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(UserError, match="tensor type 31 is unknown"):
        load(tmp_path / "model.gguf")
    data[at] = KINDS.I32
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(UserError, match="I32, a quantisation that Baleen does not read"):
        load(tmp_path / "model.gguf")


ATTEMPT = """
from baleen.interop.load import load
def attempt():
    load(path)
"""


@pytest.mark.parametrize("count", [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_files_are_refused_in_little_memory(tmp_path, exported, count):
    exported()
    refused, grown_kib = fuzz(tmp_path / "model.gguf", count, ATTEMPT)
    assert refused >= 0.5 * count  # the rest changed letters of tokens, or a field nobody asks for
    assert grown_kib < 50_000
