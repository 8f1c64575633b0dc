"""Checkpoints that survive kills, bad disks and full ones."""

import json
import os
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import torch

from baleen.config import UserError
from baleen.parallel.ranks import RankLost
from baleen.train import checkpoint
from baleen.train.checkpoint import Checkpoint, NotSaved, TornCheckpoint, load, load_newest, save, saved_steps
from baleen.train.saver import Saver, TeamSaver

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def checkpoint_of(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 6, generator=generator)
    tensors = {
        "model": {"a.weight": weight.t(), "b": torch.arange(3)},
        "optimizer": {"a.weight.step": torch.tensor(1.0)},
    }
    return Checkpoint(step, tensors, {"counters": {"step": step}, "seconds": 0.1 + step})


def assert_equal(a: Checkpoint, b: Checkpoint) -> None:
    assert (a.step, a.state, a.tensors.keys()) == (b.step, b.state, b.tensors.keys())
    for name, tensors in a.tensors.items():
        assert tensors.keys() == b.tensors[name].keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == b.tensors[name][key].dtype and tensor.equal(b.tensors[name][key])


def test_round_trip(tmp_path):
    save(tmp_path / "checkpoints", checkpoint_of(7), keep=2)
    assert_equal(load(tmp_path / "checkpoints", 7), checkpoint_of(7))
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "step-7").iterdir()) == FILES


def test_the_newest_by_number_is_loaded(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, checkpoint_of(step), keep=5)
    assert saved_steps(tmp_path) == [9, 10, 100]
    newest = load_newest(tmp_path, pytest.fail)
    assert newest is not None and newest.step == 100


def test_no_checkpoint_is_none(tmp_path):
    assert load_newest(tmp_path / "nothing", pytest.fail) is None


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_are_kept(tmp_path, keep):
    for step in range(1, 5):
        save(tmp_path, checkpoint_of(step), keep=keep)
    assert saved_steps(tmp_path) == [1, 2, 3, 4][-keep:]


def test_the_same_step_is_replaced(tmp_path):
    save(tmp_path, Checkpoint(3, {"model": {}}, {"old": True}), keep=2)
    save(tmp_path, checkpoint_of(3), keep=2)
    assert_equal(load(tmp_path, 3), checkpoint_of(3))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", [cut, flip, Path.unlink, lambda file: file.write_bytes(b"")], ids=str)
def test_a_torn_altered_or_missing_file_is_named_and_the_one_before_is_used(tmp_path, file, harm):
    for step in (1, 2):
        save(tmp_path, checkpoint_of(step), keep=2)
    harm(tmp_path / "step-2" / file)
    with pytest.raises(TornCheckpoint, match=r"step-2"):
        load(tmp_path, 2)
    warnings = []
    newest = load_newest(tmp_path, warnings.append)
    assert newest is not None
    assert_equal(newest, checkpoint_of(1))
    assert len(warnings) == 1 and warnings[0].startswith("checkpoint step-2 is passed over")
    assert file in warnings[0] or file == "manifest.json"  # an altered manifest accuses the file it lists


def test_a_manifest_that_lists_nothing_is_torn(tmp_path):
    save(tmp_path, checkpoint_of(1), keep=2)
    for content in ("{}", "[]", "null", '{"state.json": 3}'):
        (tmp_path / "step-1" / "manifest.json").write_text(content)
        with pytest.raises(TornCheckpoint):
            load(tmp_path, 1)


def test_a_save_after_a_torn_one_outlives_it(tmp_path):
    """Resumed before a torn step 10, a stop at step 9 must not be dropped as the older of the two."""
    save(tmp_path, checkpoint_of(8), keep=1)
    save(tmp_path, checkpoint_of(10), keep=2)
    cut(tmp_path / "step-10" / "model.safetensors")
    save(tmp_path, checkpoint_of(9), keep=1)
    newest = load_newest(tmp_path, lambda message: None)
    assert newest is not None and newest.step == 9


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["fsync", "rename", "rmtree"])
def test_a_kill_before_the_rename_leaves_no_checkpoint(tmp_path, monkeypatch, moment):
    save(tmp_path, checkpoint_of(1), keep=2)

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "fsync":
            patch.setattr("os.fsync", killed)
        elif moment == "rename":
            patch.setattr(Path, "rename", killed)
        else:
            patch.setattr(checkpoint.safetensors.torch, "save_file", killed)
        with pytest.raises(Killed):
            save(tmp_path, checkpoint_of(2), keep=2)
    assert saved_steps(tmp_path) == [1]
    assert any(p.name.startswith(".aside") for p in tmp_path.iterdir())  # what the kill left
    newest = load_newest(tmp_path, pytest.fail)
    assert newest is not None and newest.step == 1
    save(tmp_path, checkpoint_of(2), keep=2)  # and nothing left aside is in the way
    assert_equal(load(tmp_path, 2), checkpoint_of(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2"]


def no_space(*_args, **_kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("at", ["aside", "rmtree"])
def test_a_kill_while_a_step_is_saved_again_keeps_it(tmp_path, monkeypatch, at):
    save(tmp_path, checkpoint_of(3), keep=1)
    rename, rmtree = Path.rename, checkpoint.shutil.rmtree

    def renamed(path, to):
        if at == "aside" and path.name == ".aside-step-3":
            raise Killed
        return rename(path, to)

    def removed(path, **how):
        if at == "rmtree" and path.name == ".old-step-3":
            raise Killed
        rmtree(path, **how)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", renamed)
        patch.setattr(checkpoint.shutil, "rmtree", removed)
        save(tmp_path, checkpoint_of(3), keep=1)
    newest = Saver(tmp_path, keep=1, warn=pytest.fail).newest()
    assert newest is not None and newest.step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_what_killed_saves_left_goes_at_the_next_start(tmp_path):
    save(tmp_path, checkpoint_of(3), keep=1)
    (tmp_path / ".aside-step-7").mkdir()
    assert Saver(tmp_path, keep=1, warn=pytest.fail).newest() is not None
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_step_on_its_way_is_not_saved_again_and_a_writer_that_hangs_is_named(tmp_path):
    saver, waited = object.__new__(TeamSaver), []
    saver.saved_step, saver.timeout_seconds, saver._pending = 2, 0.05, (checkpoint_of(4), Future())

    def largest(values):  # the other rank is done
        waited.append(values)
        return [values[0], 1.0, values[2]]

    saver.ranks = SimpleNamespace(largest=largest, places_of=lambda late: ["rank 1 (host, process 7)"] if late else [])
    assert saver.has(2) and saver.has(4) and not saver.has(3)
    saver.settle(wait=False)
    assert len(waited) == 1
    with pytest.raises(RankLost, match="rank 1 .* no longer answers"):
        saver.settle(wait=True)


@pytest.mark.parametrize("fault", ["tensors", "state", "sync", "io error of safetensors"])
def test_a_full_disk_loses_only_that_save(tmp_path, monkeypatch, fault):
    save(tmp_path, checkpoint_of(1), keep=1)
    with monkeypatch.context() as patch:
        if fault == "tensors":
            patch.setattr(checkpoint.safetensors.torch, "save_file", no_space)
        elif fault == "state":
            patch.setattr(Path, "write_text", no_space)
        elif fault == "sync":
            patch.setattr(os, "fsync", no_space)
        else:

            def raises(*_args, **_kwargs):
                raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

            patch.setattr(checkpoint.safetensors.torch, "save_file", raises)
        with pytest.raises(NotSaved, match=r"step-2 could not be saved .*No space left") as caught:
            save(tmp_path, checkpoint_of(2), keep=1)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert_equal(load(tmp_path, 1), checkpoint_of(1))


def test_no_pickle_is_written_or_read(tmp_path):
    save(tmp_path, checkpoint_of(1), keep=1)
    planted = tmp_path / "step-1" / "model.pt"
    planted.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
    assert_equal(load(tmp_path, 1), checkpoint_of(1))
    manifest = tmp_path / "step-1" / "manifest.json"
    sums = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**sums, "model.pt": checkpoint.sha256(planted)}))
    load(tmp_path, 1)
    assert not (tmp_path / "owned").exists()


def test_if_none_is_whole_nothing_starts_over(tmp_path):
    save(tmp_path, Checkpoint(3, {"model": {"a": torch.ones(2)}}, {}), keep=2)
    (tmp_path / "step-3" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="no checkpoint in .* is whole"):
        load_newest(tmp_path, lambda message: None)
