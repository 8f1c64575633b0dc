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
    assert opened == ["eval"] and result["window"] == 16


def test_samples_are_of_programs(tmp_path, monkeypatch):
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=16))
    monkeypatch.setattr(eval_run, "load", lambda run: SimpleNamespace(model=model, tokenizer=None))
    monkeypatch.setattr(eval_run, "Engine", lambda *_: None)
    monkeypatch.setattr(eval_run, "score_task", lambda engine, questions, samples: {"asked": len(questions) * samples})
    gaps, programs = tmp_path / "gaps.jsonl", tmp_path / "programs.jsonl"
    gaps.write_text('{"text": "a", "gap": "b"}\n')
    programs.write_text('{"prompt": "a", "test": "b"}\n')
    with pytest.raises(UserError, match="--samples 3 is of programs"):
        eval_run.evaluate_run(tmp_path, tasks=[str(gaps)], samples=3)
    twice = eval_run.evaluate_run(tmp_path, tasks=[str(programs), str(gaps), str(gaps)], samples=3)
    assert twice["tasks"] == {str(programs): {"asked": 3}, str(gaps): {"asked": 3}}
