"""`baleen eval`: what is refused costs nothing, what is measured is accounted for."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from baleen.config import UserError
from baleen.eval import run as eval_run


def test_the_stage_opens_only_once_the_input_is_good(tmp_path, monkeypatch):
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=16))
    monkeypatch.setattr(eval_run, "load", lambda run: SimpleNamespace(model=model, tokenizer=None))
    monkeypatch.setattr(eval_run, "bits_per_byte", lambda *_, window: {"bits_per_byte": 1.0, "window": window})
    opened = []

    @contextmanager
    def account():
        opened.append("eval")
        yield

    for texts in ((), (tmp_path / "missing.txt",)):
        with pytest.raises(UserError):
            eval_run.evaluate_run(tmp_path, texts, account)
    assert opened == []
    (tmp_path / "text.txt").write_text("some text\n")
    result = eval_run.evaluate_run(tmp_path, (tmp_path / "text.txt",), account)
    assert opened == ["eval"] and result["window"] == 16 and not result["heldout"]


def test_samples_are_of_programs(tmp_path, monkeypatch):
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=16))
    monkeypatch.setattr(eval_run, "load", lambda run: SimpleNamespace(model=model, tokenizer=None))
    monkeypatch.setattr(eval_run, "Engine", lambda *_, **__: None)
    monkeypatch.setattr(eval_run, "score_task", lambda engine, questions, samples: {"asked": len(questions) * samples})
    gaps, programs = tmp_path / "gaps.jsonl", tmp_path / "programs.jsonl"
    gaps.write_text('{"text": "a", "gap": "b"}\n')
    programs.write_text('{"prompt": "a", "test": "b"}\n')
    with pytest.raises(UserError, match="--samples 3 is of programs"):
        eval_run.evaluate_run(tmp_path, tasks=[str(gaps)], samples=3)
    twice = eval_run.evaluate_run(tmp_path, tasks=[str(programs), str(gaps), str(gaps)], samples=3)
    assert twice["tasks"] == {str(programs): {"asked": 3}, str(gaps): {"asked": 3}}


@pytest.mark.parametrize("section", ["", "[model]\nhidden_size = 8\n"])
def test_held_out_text_of_recipes_of_every_kind(tmp_path, monkeypatch, section):
    """A model that was trained on keeps the tokenizer it came with; one made anew had its own trained."""
    config = SimpleNamespace(max_position_embeddings=16, vocab_size=300)
    monkeypatch.setattr(
        eval_run, "load", lambda run: SimpleNamespace(model=SimpleNamespace(config=config), tokenizer="its own")
    )
    asked = {}
    monkeypatch.setattr(
        eval_run, "prepare", lambda data, **options: asked.update(options) or SimpleNamespace(heldout=["text"])
    )
    config.max_position_embeddings = 128
    monkeypatch.setattr(eval_run, "bits_per_byte", lambda *_, window: {"window": window})
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[[stages]]\nkind = 'rl'\n")
    with pytest.raises(UserError, match="no text of its own"):
        eval_run.evaluate_run(tmp_path)
    recipe.write_text(f"{section}[data]\nsources = ['a.txt']\n[train]\nseq_len = 64\nseed = 3\nminutes = 5\n")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no text of its own"):
        patch.setattr(eval_run, "prepare", lambda *_, **__: SimpleNamespace(heldout=[]))  # data.heldout_fraction = 0
        eval_run.evaluate_run(tmp_path)
    result = eval_run.evaluate_run(tmp_path)
    assert result["window"] == 64 and result["heldout"]
    assert (asked["seed"], asked["vocab_size"]) == (3, 300)
    assert asked["tokenizer"] == (None if section else "its own")
    (tmp_path / "other.txt").write_text("some text\n")  # no further than the rows that it was trained on
    other = eval_run.evaluate_run(tmp_path, (tmp_path / "other.txt",))
    assert other["window"] == 64 and not other["heldout"]
    told = []
    (tmp_path / "data/old").mkdir(parents=True)
    (tmp_path / "data/old/stats.json").touch()
    monkeypatch.setattr(eval_run, "prepare", lambda *_, **__: made_anew(tmp_path / "data/new"))
    eval_run.evaluate_run(tmp_path, say=told.append)
    assert len(told) == 1 and "not as they were when the run was trained" in told[0]
    eval_run.evaluate_run(tmp_path, say=told.append)  # is there now
    assert len(told) == 1


def made_anew(directory):
    directory.mkdir(exist_ok=True)
    (directory / "stats.json").touch()
    return SimpleNamespace(heldout=["text"])
