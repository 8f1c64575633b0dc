"""`baleen import`, `export` and `upcycle` as a user types them: the path on stdout, or one sentence and exit code 2."""

import json
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from baleen.cli import main
from baleen.data.tokenizer_training import train_tokenizer
from baleen.interop.huggingface import save_model
from baleen.interop.load import load


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_model):
    """Holds v3/, llama/ and taken/; what is made lands there too."""
    tokenizer = train_tokenizer(["the whale and the krill " * 20], 290)
    save_model(tiny_model(vocab_size=290), tmp_path / "v3", tokenizer=tokenizer)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=290, **shape, **ends)).save_pretrained(tmp_path / "llama")
    tokenizer.save(tmp_path / "llama")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("precious")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def baleen(monkeypatch, capsys):
    """Runs a command line; returns exit code, stdout and stderr."""

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["baleen", *line.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def test_import(folder, baleen):
    assert baleen("import v3 new --dtype bf16") == (0, "new\n", "")
    assert load(folder / "new").model.model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("line", ["export v3 new", "export v3 new.gguf --to gguf --dtype q8_0"])
def test_export(folder, baleen, line):
    assert baleen(line) == (0, line.split()[2] + "\n", "")
    assert load(line.split()[2]).tokenizer.encode("the krill")


def test_upcycle_and_what_to_know_before_it_is_served(folder, baleen):
    assert baleen("upcycle llama new --slices 2 --experts 2 --mtp 1") == (0, "new\n", "")
    assert load("new").model.config.n_routed_experts == 4
    code, out, err = baleen("export new away")
    assert (code, out) == (0, "away\n") and err.startswith("warning: ") and err.count("\n") == 1
    assert "vLLM" in err and "--portable" in err
    assert baleen("upcycle llama portable --portable")[0] == 0
    assert baleen("export portable portable-away") == (0, "portable-away\n", "")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import nowhere new", "nowhere"),
        ("import llama new", "baleen upcycle llama new"),
        ("import v3 taken", "taken exists already"),
        ("import v3 new --dtype int4", "int4"),
        ("import v3 taken/mine.txt/new", "name another place"),
        ("export v3 new --to onnx", "take hf or gguf"),
        ("export v3 new --to gguf", "end it in .gguf"),
        ("export v3 new.gguf --to gguf --dtype int3", "int3"),
        ("export nowhere new", "nowhere"),
        ("upcycle v3 new", "baleen import"),
        ("upcycle nowhere new", "nowhere"),
        ("upcycle llama taken", "taken exists already"),
        ("upcycle llama new --slices 5", "does not divide"),
        ("upcycle llama new --value-rank 99", "take 1 to 32"),
        ("upcycle llama new --dtype fp16", "fp16"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(folder, baleen, line, said):
    before = sorted(folder.rglob("*"))
    code, out, err = baleen(line)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert said in err and sorted(folder.rglob("*")) == before


def test_a_config_that_lies_is_one_sentence_too(folder, baleen):
    file = folder / "llama/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token_id": 10**6}))
    code, _, err = baleen("upcycle llama new")
    assert code == 2 and "bos_token_id (1000000) is outside the vocabulary of 290" in err and err.count("\n") == 1
