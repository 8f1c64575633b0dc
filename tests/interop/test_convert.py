"""import and export: the same weights in another layout, within little memory, and nothing overwritten."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from baleen.config import UserError
from baleen.data.tokenizer_training import train_tokenizer
from baleen.interop.convert import export_checkpoint, import_checkpoint
from baleen.interop.huggingface import load_model, save_model
from baleen.interop.load import load
from baleen.interop.shards import put_in_place, replaced_when_complete
from baleen.model.fp8 import WEIGHT_BLOCK, dequantize_blocks, quantize_blocks

FILE = "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_export_import_is_bit_identical(tmp_path, tiny_model, dtype):
    save_model(tiny_model(), tmp_path / "a", dtype=dtype, max_shard_bytes=30_000, generation={"top_p": 0.9})
    import_checkpoint(tmp_path / "a", tmp_path / "b")
    export_checkpoint(tmp_path / "b", tmp_path / "c")
    import_checkpoint(tmp_path / "c", tmp_path / "d")
    assert (tmp_path / "b" / FILE).read_bytes() == (tmp_path / "d" / FILE).read_bytes()
    shards = [load_file(file) for file in (tmp_path / "a").glob("*.safetensors")]
    before = {name: tensor for shard in shards for name, tensor in shard.items()}
    after = load_file(tmp_path / "d" / FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "d" / name).read_text()


@pytest.mark.parametrize("scales", ["fp32", "ue8m0"])
def test_fp8_out_and_in(tmp_path, tiny_model, scales):
    model = tiny_model(moe_intermediate_size=200, hidden_size=160)
    save_model(model, tmp_path / "bf16", dtype=torch.bfloat16)
    export_checkpoint(tmp_path / "bf16", tmp_path / "fp8", dtype="fp8" if scales == "fp32" else "fp8-ue8m0")
    written = load_file(tmp_path / "fp8" / FILE)
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    assert written[name].dtype == torch.float8_e4m3fn and written[name + "_scale_inv"].shape == (2, 2)
    assert written["model.layers.2.mlp.gate.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert config["weight_block_size"] == [128, 128] and config.get("scale_fmt", "fp32") == scales

    loaded = load_model(tmp_path / "fp8", dtype=torch.float32)
    source = load_model(tmp_path / "bf16", dtype=torch.float32)
    up = source.model.layers[2].mlp.experts.gate_up_proj[5, 200:]
    expected = dequantize_blocks(*quantize_blocks(up, WEIGHT_BLOCK, power_of_two=scales == "ue8m0"), WEIGHT_BLOCK)
    assert torch.equal(loaded.model.layers[2].mlp.experts.gate_up_proj[5, 200:], expected)
    assert torch.equal(loaded.mtp_layers[0].eh_proj.weight, source.mtp_layers[0].eh_proj.weight)

    import_checkpoint(tmp_path / "fp8", tmp_path / "back")
    back = load_file(tmp_path / "back" / FILE)
    assert back[name].dtype == torch.bfloat16 and not any(n.endswith("_scale_inv") for n in back)
    assert torch.equal(back[name].float(), expected.bfloat16().float())


def test_scales_as_ue8m0_numbers(tmp_path, tiny_model, same):
    """Later releases store the exponents alone."""
    save_model(tiny_model(), tmp_path / "model", fp8="ue8m0")
    reference = load_model(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / FILE)
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        tensors[name] = tensors[name].to(torch.float8_e8m0fnu)
    header, offset, data = {}, 0, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        kinds = {"float32": "F32", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0"}
        kind = kinds[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, offset + len(raw)]}
        offset, data = offset + len(raw), data + raw
    text = json.dumps(header).encode()
    (tmp_path / "model" / FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert same(load_model(tmp_path / "model"), reference)


def test_refusals_write_nothing(tmp_path, tiny_model):
    save_model(tiny_model(), tmp_path / "model")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("precious")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text('{"model_type": "llama"}')
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for source, out, options, word in [
        ("model", "taken", {}, "exists"),
        ("llama", "new", {}, "baleen upcycle"),
        ("model", "new", {"dtype": "int4"}, "int4"),
        ("nowhere", "new", {}, "nowhere"),
    ]:
        with pytest.raises(UserError, match=word):
            import_checkpoint(tmp_path / source, tmp_path / out, **options)
    with pytest.raises(UserError, match="onnx"):
        export_checkpoint(tmp_path / "model", tmp_path / "new", to="onnx")
    data = bytearray((tmp_path / "model" / FILE).read_bytes())
    data[-1000] ^= 1
    (tmp_path / "model" / FILE).write_bytes(data)
    with pytest.raises(UserError, match="checksum"):
        import_checkpoint(tmp_path / "model", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert (tmp_path / "taken/mine.txt").read_text() == "precious"


def test_what_goes_with_the_weights(tmp_path, tiny_model):
    save_model(tiny_model(), tmp_path / "model")
    companions = {"LICENSE-MODEL", "LICENSE-CODE", "NOTICE", "tiktoken.model", "tokenization_moonshot.py"}
    for name in (*companions, "modeling_deepseek.py", "optimizer.pt"):
        (tmp_path / "model" / name).write_text(name)
    import_checkpoint(tmp_path / "model", tmp_path / "new")
    weights = {"config.json", "generation_config.json", FILE}
    assert {p.name for p in (tmp_path / "new").iterdir()} == companions | weights
    with pytest.raises(UserError, match="convert_tiktoken_to_fast"):
        load(tmp_path / "new")


@pytest.mark.parametrize("out", ["file/new", "file/deep/new.gguf", "/proc/new", "/proc/new.gguf"])
def test_where_nothing_can_be_made(tmp_path, tiny_model, out):
    save_model(
        tiny_model(vocab_size=290),
        tmp_path / "model",
        tokenizer=train_tokenizer(["the whale and the krill " * 20], 290),
    )
    (tmp_path / "file").write_text("precious")
    to = "gguf" if out.endswith("gguf") else "hf"
    with pytest.raises(UserError, match="cannot be made .*name another place"):
        export_checkpoint(tmp_path / "model", tmp_path / out, to=to)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model"]


def test_a_model_is_never_lost(tmp_path, monkeypatch):
    """What took its place cannot, so it comes back; and what a kill between the two renames left is found again."""
    for name in ("model", "aside", ".model.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "whose").write_text(name)
    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda path, to: refuse() if path.name == "aside" else rename(path, to))
        with pytest.raises(OSError, match="refused"):
            put_in_place(tmp_path / "aside", tmp_path / "model")
    assert (tmp_path / "model/whose").read_text() == "model"
    rename(tmp_path / "model", tmp_path / ".model.old")
    put_in_place(tmp_path / "aside", tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and (tmp_path / "model/whose").read_text() == "aside"


def test_what_takes_a_models_place_is_on_the_disk_before(tmp_path, monkeypatch, tiny_model):
    done: list[str] = []
    rename, fsync = Path.rename, os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: done.append(Path(os.readlink(f"/proc/self/fd/{d}")).name) or fsync(d))
    monkeypatch.setattr(Path, "rename", lambda path, to: done.append("rename") or rename(path, to))
    save_model(tiny_model(), tmp_path / "model")
    before, after = done[: done.index("rename")], done[done.index("rename") :]
    assert {"config.json", FILE, "generation_config.json", ".model.partial"} <= set(before)
    assert after[1:] == [tmp_path.name]


def test_two_that_make_the_same_model(tmp_path):
    with replaced_when_complete(tmp_path / "model") as aside:
        (aside / "whose").write_text("first")
        with pytest.raises(UserError, match="another process is making"), replaced_when_complete(tmp_path / "model"):
            pass
    assert (tmp_path / "model/whose").read_text() == "first"
    with replaced_when_complete(tmp_path / "model") as aside:
        assert not list(aside.iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_model_behind_a_link_is_replaced_where_it_lies(tmp_path):
    (tmp_path / "disk/model").mkdir(parents=True)
    (tmp_path / "model").symlink_to(tmp_path / "disk/model")
    for text in ("one", "two"):
        with replaced_when_complete(tmp_path / "model") as aside:
            (aside / "whose").write_text(text)
        assert (tmp_path / "model").is_symlink() and (tmp_path / "disk/model/whose").read_text() == text
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["model"]


def test_every_end_token_of_a_configuration_comes_along(tmp_path, tiny_model):
    save_model(tiny_model(), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"eos_token_id": [1, 5]}))
    (tmp_path / "model/generation_config.json").unlink()
    import_checkpoint(tmp_path / "model", tmp_path / "new")
    assert json.loads((tmp_path / "new/generation_config.json").read_text())["eos_token_id"] == [1, 5]


def refuse():
    raise OSError(5, "refused")


def test_float16_must_hold_every_value(tmp_path, tiny_model):
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    save_model(model, tmp_path / "model")
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj.*float16"):
        export_checkpoint(tmp_path / "model", tmp_path / "new", dtype="fp16")
    assert not (tmp_path / "new").exists()


STREAM = """
import sys
from pathlib import Path
from baleen.interop.convert import export_checkpoint
def high_water():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
large, out, to, dtype = sys.argv[1:]
export_checkpoint(large, out + f"-first.{to}", to=to, dtype=dtype or None)  # brings in the libraries' own pages
Path("/proc/self/clear_refs").write_text("5")
before = high_water()
export_checkpoint(large, out + f".{to}", to=to, dtype=dtype or None)
print(high_water() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark from /proc")
@pytest.mark.parametrize(
    ("source", "to", "dtype"),
    [
        ("fp32", "hf", "bf16"),
        pytest.param("fp32", "hf", "", marks=pytest.mark.slow),
        pytest.param("fp8", "hf", "", marks=pytest.mark.slow),
        pytest.param("bf16", "hf", "fp8", marks=pytest.mark.slow),
        pytest.param("fp32", "gguf", "f32", marks=pytest.mark.slow),
        pytest.param("bf16", "gguf", "q8_0", marks=pytest.mark.slow),
        pytest.param("fp8", "gguf", "q8_0", marks=pytest.mark.slow),
    ],
)
def test_memory_stays_under_the_largest_shard_and_one_expert(tmp_path, tiny_model, source, to, dtype):
    width = {"fp32": 4, "bf16": 2, "fp8": 1}[source]
    # narrow weights are widened to compute, and what is freed is not given back at once: shards large beside a tensor
    sides, layers, experts_a_shard = {4: (1, 2, 1.5), 2: (2, 5, 5), 1: (2, 5, 7)}[width]
    shape = {"hidden_size": 1024 * sides, "moe_intermediate_size": 512 * sides, "num_hidden_layers": layers}
    expert = 3 * shape["hidden_size"] * shape["moe_intermediate_size"] * width
    save_model(
        tiny_model(vocab_size=290, num_nextn_predict_layers=0, **shape),
        tmp_path / "large",
        tokenizer=train_tokenizer(["the whale and the krill " * 20], 290),
        dtype=torch.float32 if width == 4 else torch.bfloat16,
        fp8="fp32" if width == 1 else None,
        max_shard_bytes=int(experts_a_shard * expert),
    )
    shards = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    assert sum(shards) > 3 * (max(shards) + expert)
    arguments = [str(tmp_path / "large"), str(tmp_path / "out"), to, dtype]
    out = subprocess.run([sys.executable, "-c", STREAM, *arguments], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 1.03 * (max(shards) + expert)  # the interpreter's own pages waver by some 100 KB
