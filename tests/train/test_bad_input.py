"""`baleen train` refuses bad input by one sentence and exit code 2, and what was there before is there after."""

import errno
import re
import sys

import pytest

from baleen import cli


@pytest.fixture
def said(monkeypatch, capsys):
    """Runs the command line: (exit code, the lines on stderr). A refusal says nothing on stdout."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["baleen", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 0 or out == ""
        return ended.value.code, err.splitlines()

    return run


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text(tiny_recipe().to_toml(), encoding="utf-8")
    return file


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_one_sentence(lines, fault):
    """The last line, and no other, is the error."""
    errors = [line for line in lines if line.startswith("error: ")]
    return errors == lines[-1:] and bool(re.search(fault, errors[0])) and "Traceback" not in "".join(lines)


@pytest.mark.parametrize(
    "override, fault",
    [
        ("train.sead=1", "unknown key .train.sead.*seed"),
        ("modell.vocab_size=300", "modell.*model"),
        ("train.lr=fast", "train.lr"),
        ("model.num_attention_heads=0", "num_attention_heads"),
        ("model.qk_rope_head_dim=3", "even number"),
        ("model.kv_lora_rank=0", "kv_lora_rank"),
        ("model.n_group=3", "not a multiple of n_group"),
        ("model.topk_group=2", "lower topk_group"),
        ("model.num_experts_per_tok=5", "above the group limit"),
        ("train.seq_len=128", "longer than model.max_position_embeddings"),
        ("data.sources=['/no/such/text']", "neither a file nor a folder"),
    ],
)
def test_a_recipe_that_cannot_be(said, recipe, tmp_path, override, fault):
    before = tree(tmp_path)
    code, lines = said("train", recipe, "--run", tmp_path / "run", "--set", override)
    assert code == 2 and is_one_sentence(lines, fault), lines
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "content, override, fault",
    [
        (b"", "train.seed=0", "is empty: give a file"),
        (b"\x00\x01" * 500, "train.seed=0", "is binary, not text: give"),
        (b"song 1 song 2 whale 3 whale 45 krill 67", "model.vocab_size=5000", r"fills only \d+: set model.vocab_size"),
    ],
)
def test_text_that_will_not_do(said, recipe, tmp_path, content, override, fault):
    """It is read once the directory is claimed; a second try finds the directory free."""
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    before = tree(tmp_path)
    command = ("train", recipe, "--run", tmp_path / "run", "--data", text, "--set", "data.heldout_fraction=0")
    for _ in range(2):
        code, lines = said(*command, "--set", override)
        assert code == 2 and is_one_sentence(lines, fault), lines
        assert tree(tmp_path).items() >= before.items()


def test_directories_and_prompts_that_do_not_fit_a_run(said, recipe, tmp_path):
    run = tmp_path / "run"
    code, _ = said("train", recipe, "--run", run, "--max-steps", 1)
    assert code == 0
    before = tree(tmp_path)
    for command, fault in (
        (("train", recipe, "--run", run, "--set", "train.lr=1e-4"), r"another recipe \(its train.lr differs"),
        (("train", recipe, "--run", run), "already holds this run: add --resume"),
        (("train", recipe, "--run", recipe), "is a file, it is not a run"),
        (("chat", run, "--prompt", "whale " * 99), "tokens, but the model's context holds 64.*shorten the prompt"),
    ):
        code, lines = said(*command)
        assert code == 2 and is_one_sentence(lines, fault), lines
        assert tree(tmp_path) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_sentence(said, monkeypatch, code):
    def full():
        raise OSError(code, "the disk says")

    monkeypatch.setattr(cli, "app", full)
    ended, lines = said("train")
    assert ended == 2 and is_one_sentence(lines, "no space left on the disk .*the disk says.*free some")


def test_another_failure_of_the_system_is_ours(monkeypatch):
    def broken():
        raise OSError(errno.EIO, "the disk says")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(OSError, match="the disk says"):
        cli.main()
