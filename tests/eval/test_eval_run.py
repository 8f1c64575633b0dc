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
