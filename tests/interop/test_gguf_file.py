"""GGUF in: every block format that the library reads, Llama rows un-permuted, its tokenizer, and headers that lie."""

import json
import random
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from baleen.config import UserError
from baleen.data.tokenizer_training import train_tokenizer
from baleen.interop.gguf_file import GGUFFile
from baleen.interop.huggingface import load_model
from baleen.interop.llama import LAYER, OUTER, open_llama
from baleen.interop.upcycle import upcycle

KINDS = gguf.GGMLQuantizationType
SETTINGS = {
    "vocab_size": 290, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}  # fmt: skip


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows (j, j + J) of each head -> side by side, as llama.cpp keeps them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def llama_gguf(tmp_path):
    """Makes tmp_path/llama.gguf of a random Llama with matrices in the given format; returns the Llama."""

    def make(kind=KINDS.F32, skip=(), change=None, settings=None, extra=None) -> LlamaForCausalLM:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SETTINGS | (settings or {}))).eval()
        writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
        writer.add_block_count(2)
        writer.add_context_length(128)
        writer.add_embedding_length(64)
        writer.add_feed_forward_length(96)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_key_length(16)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        tokenizer = train_tokenizer(["the whale and the krill " * 20], 290)
        tokenizer.save(tmp_path / "tokenizer")
        description = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
        vocabulary = description["model"]["vocab"]
        added = {token["content"]: token["id"] for token in description["added_tokens"]}
        tokens = sorted(vocabulary | added, key=(vocabulary | added).__getitem__)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in added else 1 for token in tokens])
        writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in description["model"]["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        state = model.state_dict()
        names = OUTER | {
            f"model.layers.{i}.{ours}.weight": f"blk.{i}.{theirs}.weight"
            for i in range(2)
            for ours, theirs in LAYER.items()
        }
        for ours, theirs in names.items():
            if theirs in skip:
                continue
            array = state[ours].numpy()
            if "q_proj" in ours or "k_proj" in ours:
                array = permuted(array, 4 if "q_proj" in ours else 2)
            array = change(theirs, array) if change else array
            wanted = kind if array.ndim == 2 and array.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else KINDS.F32
            writer.add_tensor(theirs, gguf.quants.quantize(array.copy(), wanted), raw_dtype=wanted)
        if extra:
            extra(writer, model)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return model

    return make


@pytest.mark.parametrize("kind", [KINDS.F32, KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_0, KINDS.Q4_1])
def test_tensors_come_back_within_their_format(tmp_path, llama_gguf, kind):
    model = llama_gguf(kind)
    source = open_llama(tmp_path / "llama.gguf")
    tolerance = {"F32": 0.0, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 8e-3, "Q4_0": 0.15, "Q4_1": 0.15}[kind.name]
    for name, tensor in model.state_dict().items():
        error = (source.read(name) - tensor).abs().max()
        assert error <= tolerance * tensor.abs().max()


@pytest.mark.parametrize("kind", [KINDS.Q2_K, KINDS.Q3_K, KINDS.Q4_K, KINDS.Q5_K, KINDS.Q6_K])
def test_k_formats_by_random_blocks(tmp_path, kind):
    """The library reads them and cannot write them."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(256, size=(3, 4, 2 * block_bytes), dtype=np.uint8)
    raw &= 0xBF  # whatever two bytes are a scale, they are no float16 of infinity or NaN
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "deepseek2")
    writer.add_tensor("before", np.ones(7, np.float32))
    writer.add_tensor("blocks", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "k.gguf")
    whole = file.read("blocks")
    assert whole.shape == (3, 4, 2 * block) and whole.std() > 0
    assert torch.equal(whole[1], file.read("blocks", 1))
    np.testing.assert_array_equal(whole.numpy(), gguf.quants.dequantize(raw, kind))
    if kind == KINDS.Q4_K:
        np.testing.assert_allclose(whole[2, 3, block:].numpy(), decoded_q4_k(raw[2, 3, block_bytes:]), rtol=1e-6)


def decoded_q4_k(block: np.ndarray) -> np.ndarray:
    """256 numbers as llama.cpp's block_q4_K has them: 8 groups of 32 with a scale and a minimum of 6 bits each."""
    d, dmin = block[:4].view(np.float16).astype(np.float32)
    packed, nibbles = block[4:16].astype(int), block[16:].reshape(4, 32)
    scales, minima = list(packed[:4] & 63), list(packed[4:8] & 63)
    scales += [packed[8 + j] & 15 | packed[j] >> 6 << 4 for j in range(4)]
    minima += [packed[8 + j] >> 4 | packed[4 + j] >> 6 << 4 for j in range(4)]
    groups = [half for row in nibbles for half in (row & 15, row >> 4)]
    return np.concatenate([d * s * g - dmin * m for s, m, g in zip(scales, minima, groups, strict=True)])


def test_upcycled_from_gguf_equals_the_source(tmp_path, llama_gguf):
    model = llama_gguf()
    upcycle(tmp_path / "llama.gguf", tmp_path / "v3", experts=2, slices=2, shared=1)
    ours = load_model(tmp_path / "v3")
    ids = torch.arange(100)[None]
    with torch.no_grad():
        reference = model(ids).logits
        logits = ours.logits(ours(ids).hidden_BTd)
    assert (logits - reference).abs().max() <= 1e-4 * reference.abs().max()


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def test_factors_of_a_scaled_rope_are_read(tmp_path, llama_gguf):
    def factors(writer, model):
        plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())

    model = llama_gguf(settings={"rope_parameters": LLAMA3}, extra=factors)
    assert model.model.rotary_emb.inv_freq[-1] < 1e-4 < 10000.0 ** (-14 / 16)
    upcycle(tmp_path / "llama.gguf", tmp_path / "v3")
    ours, ids = load_model(tmp_path / "v3"), torch.arange(100)[None]
    with torch.no_grad():
        reference = model(ids).logits
        logits = ours.logits(ours(ids).hidden_BTd)
    assert (logits - reference).abs().max() <= 1e-4 * reference.abs().max()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (lambda w, _: w.add_rope_dimension_count(8), "part of each head"),
        (lambda w, _: w.add_tensor("rope_freqs.weight", np.ones(5, np.float32)), "rope_freqs.weight .*8 rotary pairs"),
        (lambda w, _: w.add_tensor("rope_freqs.weight", np.zeros(8, np.float32)), "not positive"),
        (lambda w, _: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), "rope scaling"),
    ],
)
def test_ropes_that_cannot_be_upcycled(tmp_path, llama_gguf, extra, words):
    llama_gguf(extra=extra)
    with pytest.raises(UserError, match=words):
        upcycle(tmp_path / "llama.gguf", tmp_path / "v3")
    assert not (tmp_path / "v3").exists()


def test_both_end_tokens_are_kept(tmp_path, llama_gguf):
    llama_gguf(extra=lambda writer, _: writer.add_eot_token_id(3))
    upcycle(tmp_path / "llama.gguf", tmp_path / "v3")
    assert json.loads((tmp_path / "v3/generation_config.json").read_text())["eos_token_id"] == [1, 3]


def test_its_tokenizer_is_read(tmp_path, llama_gguf):
    llama_gguf()
    tokenizer = open_llama(tmp_path / "llama.gguf").tokenizer()
    assert tokenizer.decode(tokenizer.encode("the whale, 12 krill\n")) == "the whale, 12 krill\n"
    assert tokenizer.encode_batch(["<|user|>"], allow_special=True) == [[tokenizer.user_id]]
    assert len(tokenizer.encode("the whale")) < 9


def test_missing_strange_and_not_finite_tensors(tmp_path, llama_gguf):
    path = tmp_path / "llama.gguf"
    llama_gguf(skip=("blk.1.attn_k.weight",))
    with pytest.raises(UserError, match="lacks"):
        open_llama(path)
    llama_gguf(change=lambda name, array: array * np.nan if name == "blk.0.ffn_up.weight" else array)
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight.*NaN"):
        upcycle(path, tmp_path / "v3")
    llama_gguf(change=lambda name, array: array[:32] if name == "blk.0.ffn_up.weight" else array)
    with pytest.raises(UserError, match="shape"):
        upcycle(path, tmp_path / "v3")
    assert not (tmp_path / "v3").exists()


def gguf_mutated(data: bytes, rng: random.Random, header: int) -> bytes:
    out = bytearray(data)
    match rng.randrange(4):
        case 0:
            for _ in range(rng.randint(1, 6)):
                out[rng.randrange(header)] = rng.randrange(256)
        case 1:
            del out[rng.randrange(len(out)) :]
        case 2:
            at = rng.randrange(header - 8)
            out[at : at + 8] = rng.choice([2**63, 2**40, 2**31, 0, rng.randrange(2**64)]).to_bytes(8, "little")
        case 3:
            at = rng.randrange(header)
            del out[at : at + rng.randrange(1, 16)]
    return bytes(out)


FUZZ = """
import random, resource, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_gguf_file import gguf_mutated
from baleen.config import UserError
from baleen.interop.gguf_file import GGUFFile
path, count = Path({path!r}), {count}
{attempt}
rng, refused, whole = random.Random(11), 0, path.read_bytes()
attempt()
header = min(info.offset for info in GGUFFile(path).tensors.values())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(count):
    path.write_bytes(gguf_mutated(whole, rng, header))
    try:
        attempt()
    except UserError:
        refused += 1
print(refused, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
ATTEMPT = """
from baleen.interop.llama import open_llama
from baleen.interop.upcycle import upcycled_config
def attempt():
    source = open_llama(path)
    upcycled_config(source)
    for name in source.shape.tensors():
        source.read(name)
    source.tokenizer()
"""


def fuzz(path, count: int, attempt: str) -> tuple[int, int]:
    """How many of `count` mutated files were refused, and by how many KiB the process grew."""
    code = FUZZ.format(here=__file__.rpartition("/")[0], path=str(path), count=count, attempt=attempt)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    refused, grown_kib = map(int, out.stdout.split())
    return refused, grown_kib


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_gguf_files_are_refused_in_little_memory(tmp_path, llama_gguf, count):
    llama_gguf()
    refused, grown_kib = fuzz(tmp_path / "llama.gguf", count, ATTEMPT)
    assert refused >= 0.5 * count  # the rest changed letters of tokens, or a field nobody asks for
    assert grown_kib < 50_000


def test_files_that_are_not_gguf(tmp_path):
    for content in (b"", b"GGUF", b"GGML" + bytes(100), b"GGUF\x03\x00\x00\x00" + b"\xff" * 16):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.gguf"):
            GGUFFile(tmp_path / "x.gguf")
