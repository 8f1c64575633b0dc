"""Checkpoints of other makers, and damaged ones: each refused by name."""

import json
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from baleen.config import UserError
from baleen.interop.checkpoint import Checkpoint
from baleen.interop.huggingface import load_model, save_model

FILE = "model.safetensors"
GATE = "model.layers.1.mlp.gate.weight"


@pytest.fixture
def saved(tmp_path, tiny_model):
    save_model(tiny_model(), tmp_path / "model")
    return tmp_path / "model"


def edit(directory, change):
    """Rewrite the tensors as another program would, without our checksums."""
    tensors = load_file(directory / FILE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / FILE)


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def refused(directory, *words):
    with pytest.raises(UserError) as caught:
        load_model(directory)
    for word in words:
        assert word in str(caught.value)


def stack(tensors):
    for layer in (1, 2, 3):
        mlp = f"model.layers.{layer}.mlp.experts."
        parts = {p: [tensors.pop(f"{mlp}{e}.{p}_proj.weight") for e in range(8)] for p in ("gate", "up", "down")}
        tensors[f"{mlp}gate_up_proj"] = torch.cat((torch.stack(parts["gate"]), torch.stack(parts["up"])), 1)
        tensors[f"{mlp}down_proj"] = torch.stack(parts["down"])


def test_stacked_experts(saved, tiny_model, same):
    edit(saved, stack)
    assert same(load_model(saved), tiny_model())
    specs = Checkpoint(saved).specs()
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in specs and not any("gate_up" in name for name in specs)


def test_old_exports_without_copies_and_with_frequencies(saved, tiny_model, same):
    def change(tensors):
        del tensors["model.layers.3.embed_tokens.weight"], tensors["model.layers.3.shared_head.head.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit(saved, change)
    assert same(load_model(saved), tiny_model())


def test_a_head_beside_tied_embeddings_must_be_the_same(tmp_path, tiny_model, same):
    model = tiny_model(tie_word_embeddings=True)
    save_model(model, tmp_path / "model")
    edit(tmp_path / "model", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same(load_model(tmp_path / "model"), model)
    edit(tmp_path / "model", lambda t: t["lm_head.weight"].add_(1))
    refused(tmp_path / "model", "lm_head.weight", "differs")


def test_kimi_is_of_the_family(saved, tiny_model):
    edit_config(saved, model_type="kimi_k2", aux_loss_alpha=0.001, seq_aux=True, ep_size=1, pretraining_tp=1)
    assert load_model(saved).config == tiny_model().config


def test_missing_extra_misshapen_and_not_finite(saved):
    whole = (saved / FILE).read_bytes()
    for change, words in [
        (lambda t: t.pop(GATE), ["lacks", GATE]),
        (lambda t: t.update({"model.layers.9.mlp.gate.weight": torch.ones(2)}), ["model.layers.9.mlp.gate.weight"]),
        (lambda t: t.update({GATE: t[GATE][:4]}), [GATE, "[4, 32]", "[8, 32]"]),
        (lambda t: t[GATE].fill_(float("nan")), [GATE, "NaN"]),
        (lambda t: t.update({GATE: t[GATE].to(torch.int8)}), [GATE, "I8"]),
        (lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)}), [GATE, "FP8 without"]),
        (lambda t: t.update({GATE + "_scale_inv": torch.ones(1, 1)}), [GATE + "_scale_inv", "no FP8 weight"]),
        (lambda t: t["model.layers.3.embed_tokens.weight"].zero_(), ["layers.3.embed_tokens", "differs"]),
        (lambda t: [t.pop(n) for n in list(t) if ".3." in n and "layers.3" in n], ["num_nextn_predict_layers", "MTP"]),
    ]:
        edit(saved, change)
        refused(saved, *words)
        (saved / FILE).write_bytes(whole)
    load_model(saved)


def test_a_flipped_bit_in_a_weight_is_noticed(saved):
    data = bytearray((saved / FILE).read_bytes())
    data[-1000] ^= 1
    (saved / FILE).write_bytes(data)
    refused(saved, FILE, "checksum")


def test_truncated_missing_and_repeated_shards(tmp_path, tiny_model):
    model = tmp_path / "model"
    save_model(tiny_model(), model, max_shard_bytes=30_000)
    shard = sorted(model.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    refused(model, shard.name, "damaged")
    shard.write_bytes(b"")
    refused(model, shard.name, "damaged")
    shard.unlink()
    refused(model, shard.name, "missing")
    shard.write_bytes(sorted(model.glob("*.safetensors"))[0].read_bytes())
    refused(model, "repeats")
    shard.write_bytes(data)
    index = model / "model.safetensors.index.json"
    promised = json.loads(index.read_text())
    promised["weight_map"]["model.norm.weight"] = "../" + shard.name
    index.write_text(json.dumps(promised))
    refused(model, "index.json")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "deepseek_v2"}, "deepseek_v2"),
        ({"hidden_size": 64}, "shape"),
        ({"vocab_size": 10**18}, "vocab_size"),
        ({"num_attention_heads": 2**30, "qk_nope_head_dim": 2**30}, "more layers or weights"),
        ({"num_hidden_layers": 10**9}, "more layers"),
        ({"n_routed_experts": 60_000, "n_group": 1, "topk_group": 1}, "more layers"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"rope_scaling": "yes"}, "rope"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_a_config_that_lies_or_asks_for_more(saved, changes, word):
    edit_config(saved, **changes)
    with pytest.raises(UserError) as caught:
        load_model(saved)
    assert word in str(caught.value)


def test_pickles_are_never_opened(saved):
    (saved / FILE).unlink()
    (saved / "pytorch_model.bin").write_bytes(b"cos\nmkdir\n(S'" + str(saved / "pwned").encode() + b"'\ntR.")
    refused(saved, "pytorch_model.bin", "pickle")
    assert not (saved / "pwned").exists()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file with some bytes changed, cut off, doubled, or a header length or number that lies."""
    out = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    match rng.randrange(6):
        case 0:
            for _ in range(rng.randint(1, 8)):
                out[rng.randrange(header)] = rng.randrange(256)
        case 1:
            del out[rng.randrange(len(out)) :]
        case 2:
            out[:8] = rng.choice([0, 1, 2**63, 2**40, header * 2, rng.randrange(2**64)]).to_bytes(8, "little")
        case 3:
            digits = [i for i in range(8, header) if chr(out[i]).isdigit()]
            for _ in range(rng.randint(1, 4)):
                out[rng.choice(digits)] = ord(rng.choice("0123456789"))
        case 4:
            at = rng.randrange(8, header)
            out[at:at] = rng.choice([b"99999999999", b'"', b"}", b"[[[[", b"\xff", b"-", b"e999"])
        case 5:
            start = rng.randrange(len(out))
            out[start:start] = out[start : start + rng.randrange(64)]
    return bytes(out)


FUZZ = """
import random, resource, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_checkpoint import mutated
from baleen.config import UserError
from baleen.interop.huggingface import load_model
model, count = Path({model!r}), {count}
rng, refused = random.Random(7), 0
names = ("model.safetensors", "config.json")
whole = {{name: (model / name).read_bytes() for name in names}}
load_model(model)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(count):
    name = rng.choices(names, [4, 1])[0]
    data = whole[name]
    if name == "config.json":
        data = mutated((len(data)).to_bytes(8, "little") + data, rng)[8:]
    else:
        data = mutated(data, rng)
    (model / name).write_bytes(data)
    try:
        load_model(model)
    except UserError:
        refused += 1
    (model / name).write_bytes(whole[name])
print(refused, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def fuzz(model, count: int) -> tuple[int, int]:
    code = FUZZ.format(here=str(__file__).rpartition("/")[0], model=str(model), count=count)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    refused, grown_kib = map(int, out.stdout.split())
    return refused, grown_kib


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_files_are_refused_in_little_memory(saved, count):
    refused, grown_kib = fuzz(saved, count)
    assert refused >= 0.8 * count  # the rest are changes to names of checksums or to spaces: the model is intact
    assert grown_kib < 50_000
