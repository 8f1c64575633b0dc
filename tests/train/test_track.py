import importlib
import sys
from types import ModuleType

import pytest

from baleen.config import UserError
from baleen.train.track import open_tracker

CONFIG = {"name": "tiny", "train": {"lr": 0.003, "betas": (0.9, 0.95)}}


class Recorder:
    """Stands for a run of wandb or trackio, or for TensorBoard's writer: writes down every call."""

    def __init__(self) -> None:
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.mark.parametrize("kind", ["trackio", "wandb"])
def test_wandb_and_trackio_get_the_run_its_recipe_and_every_step(kind, monkeypatch, tmp_path, capsys):
    run, package, opened = Recorder(), ModuleType(kind), []
    package.init = lambda **kwargs: print("a greeting") or opened.append(kwargs) or run
    monkeypatch.setitem(sys.modules, kind, package)
    tracker = open_tracker(kind, tmp_path / "mine", CONFIG)
    tracker.log(1, {"loss": 2.5})
    tracker.log(2, {"loss": 2.0, "lr": 1e-3})
    tracker.close()
    assert opened[0].pop("dir", None) == (str(tmp_path / "mine") if kind == "wandb" else None)
    assert opened == [
        {
            "project": "baleen",
            "name": "mine",
            "config": {"name": "tiny", "train.lr": 0.003, "train.betas": (0.9, 0.95)},
        }
    ]
    assert run.calls == [
        ("log", ({"loss": 2.5},), {"step": 1}),
        ("log", ({"loss": 2.0, "lr": 1e-3},), {"step": 2}),
        ("finish", (), {}),
    ]
    assert capsys.readouterr() == ("", "a greeting\n")


def test_tensorboard_gets_every_number_by_name_and_step(monkeypatch, tmp_path):
    writer, package, folders = Recorder(), ModuleType("torch.utils.tensorboard"), []
    package.SummaryWriter = lambda folder: folders.append(folder) or writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    tracker = open_tracker("tensorboard", tmp_path, CONFIG)
    tracker.log(7, {"loss": 2.5, "lr": 1e-3})
    tracker.close()
    assert folders == [str(tmp_path / "tensorboard")]
    assert writer.calls[0][0] == "add_text" and "train.lr = 0.003" in writer.calls[0][1][1]
    assert writer.calls[1:] == [
        ("add_scalar", ("loss", 2.5, 7), {}),
        ("add_scalar", ("lr", 1e-3, 7), {}),
        ("close", (), {}),
    ]


def test_none_imports_nothing_and_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    tracker = open_tracker("none", tmp_path, CONFIG)
    tracker.log(1, {"loss": 2.5})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_named_with_its_cure(kind, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, kind, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match=rf"--track {kind} needs .* pip install '?[a-z\-\[\]]+'?"):
        open_tracker(kind, tmp_path, CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_package_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "wandb.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        open_tracker("wandb", tmp_path, CONFIG)


def test_an_unknown_kind_is_named(tmp_path):
    with pytest.raises(UserError, match="'mlflow'.*tensorboard"):
        open_tracker("mlflow", tmp_path, CONFIG)


@pytest.mark.slow
def test_tensorboard_reads_back_what_was_logged(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = open_tracker("tensorboard", tmp_path, CONFIG)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 2.0 / step, "lr": 1e-3})
    tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "lr"]
    loss = [(event.step, event.value) for event in events.Scalars("loss")]
    assert loss == [(step, pytest.approx(2.0 / step)) for step in (1, 2, 3)]
    (recipe,) = events.Tensors("recipe/text_summary")
    assert b"train.lr = 0.003" in recipe.tensor_proto.string_val[0]
