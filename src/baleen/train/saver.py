"""When checkpoints are written: at once by one process, beside the training by several."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from baleen.config import UserError
from baleen.parallel.ranks import RankLost, Ranks
from baleen.parallel.state import SHARDS, begin_save, shard_file
from baleen.train import checkpoint
from baleen.train.checkpoint import Checkpoint, Stored

POLL_SECONDS = 0.05


class Saver:
    """Checkpoints of one process. A disk that refuses one costs only that one."""

    def __init__(self, folder: Path, *, keep: int, warn: Callable[[str], None]):
        self.folder, self.keep, self.warn = folder, keep, warn
        self.saved_step = 0

    def newest(self) -> Stored | None:
        """The newest whole checkpoint to continue from."""
        checkpoint.tidy(self.folder)
        newest = checkpoint.load_newest(self.folder, self.warn)
        self.saved_step = 0 if newest is None else newest.step
        return newest

    def save(self, taken: Checkpoint) -> None:
        try:
            checkpoint.save(self.folder, taken, keep=self.keep)
            self.saved_step = taken.step
        except checkpoint.NotSaved as error:
            self.warn(str(error))

    def settle(self, *, wait: bool) -> None:
        """Finish a save that is under way, if it can be or must be. Called after every step."""

    def has(self, step: int) -> bool:
        """Whether a checkpoint of this step is on the disk, or on its way."""
        return step == self.saved_step

    def standing(self, step: int) -> str:
        """In words, whether what was trained up to `step` is on the disk."""
        return "and saved" if step == self.saved_step else f"and NOT saved; step {self.saved_step} is the last that is"


class _Writing(NamedTuple):
    """How far the ranks are with one checkpoint."""

    some_write: bool
    some_are_done: bool
    too_long: bool  # for at least one of those that wait


class TeamSaver(Saver):
    """Checkpoints of several processes: `save` copies tensors aside, `settle` publishes what all ranks have written.

    All ranks call every method together. One that cannot be saved ends the run: NotSaved is raised on rank 0, and the
    others end without a word.
    """

    def __init__(self, folder: Path, *, keep: int, warn: Callable[[str], None], ranks: Ranks, timeout_seconds: float):
        """timeout_seconds: how long those that have written wait for another rank."""
        super().__init__(folder, keep=keep, warn=warn)
        self.ranks, self.timeout_seconds = ranks, timeout_seconds
        talk = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        assert isinstance(talk, dist.ProcessGroup)
        self.talk = talk
        self._pending: tuple[Checkpoint, Future[str]] | None = None

    def newest(self) -> Stored | None:
        """Every rank reads a share of the files: a checkpoint of terabytes would keep the others waiting for one."""
        lead = self.ranks.rank == 0
        self.ranks.lead(lambda: checkpoint.tidy(self.folder))
        steps = checkpoint.saved_steps(self.folder) if lead else []
        torn = False
        while (step := int(self.ranks.largest([steps.pop() if steps else -1])[0])) >= 0:
            fault = self.ranks.first_word(f"step-{step}", self._fault_of_share(step))
            if fault is None:
                is_cut = (self.folder / f"step-{step}" / SHARDS).is_dir()
                self.saved_step = step if is_cut else -1  # one process wrote it: to be written again, in shards
                return checkpoint.open_step(self.folder, step)
            torn = True
            if lead:
                self.warn(checkpoint.passed_over(step, fault))
        if torn:  # on all ranks, of which one speaks
            raise UserError(checkpoint.none_whole(self.folder))
        return None

    def _fault_of_share(self, step: int) -> str | None:
        """What is torn among the files of a checkpoint that this rank looks at."""
        directory = self.folder / f"step-{step}"
        try:
            files = sorted(checkpoint.manifest(directory).items())
            checkpoint.require_whole(directory, dict(files[self.ranks.rank :: self.ranks.world]))
        except checkpoint.TornCheckpoint as error:
            return str(error)
        return None

    def save(self, taken: Checkpoint) -> None:
        self.settle(wait=True)
        self.ranks.lead(lambda: _fresh(self._aside(taken.step) / SHARDS))
        written = begin_save(self._aside(taken.step) / SHARDS, taken.tensors, self.talk)
        hashed: Future[str] = Future()  # by the thread that writes, while training goes on
        mine = self._aside(taken.step) / SHARDS / shard_file(self.ranks.rank)
        written.add_done_callback(partial(_hash, mine, hashed))
        self._pending = taken, hashed

    def has(self, step: int) -> bool:
        return super().has(step) or (self._pending is not None and self._pending[0].step == step)

    def settle(self, *, wait: bool) -> None:
        if self._pending is None:
            return
        taken, future = self._pending
        waited = 0.0  # since some were done and others not: of one that hangs the others' writers give up by themselves
        while (state := self._agreed(future.done(), waited > self.timeout_seconds)).some_write:
            if not wait:
                return
            if state.too_long:
                raise RankLost(self.ranks.places_of(not future.done()))
            time.sleep(POLL_SECONDS)
            waited += POLL_SECONDS if state.some_are_done else 0.0
        self._pending = None
        aside, final = self._aside(taken.step), self.folder / f"step-{taken.step}"
        fault = future.exception()
        digest = b"" if fault else bytes.fromhex(future.result())
        if self.ranks.largest([float(fault is not None)])[0]:
            self.ranks.lead(lambda: _refuse(aside, final, _said(fault)))
        sums = self._gather(digest)
        self.ranks.lead(lambda: self._publish(aside, final, taken, sums))
        self.saved_step = taken.step

    def _agreed(self, done: bool, too_long: bool) -> _Writing:
        return _Writing(*map(bool, self.ranks.largest([float(not done), float(done), float(too_long)])))

    def _publish(self, aside: Path, final: Path, taken: Checkpoint, sums: dict[str, str]) -> None:
        try:
            (aside / "state.json").write_text(json.dumps(taken.state))
            sums = {**sums, "state.json": checkpoint.sha256(aside / "state.json")}
            checkpoint.publish(aside, final, sums, keep=self.keep)
        except OSError as error:
            _refuse(aside, final, f"rank 0: {error}")

    def _gather(self, digest: bytes) -> dict[str, str]:
        """{file: sha256} of every rank that wrote one."""
        mine = torch.zeros(33, dtype=torch.uint8)
        if digest:
            mine[:] = torch.frombuffer(bytearray(b"\1" + digest), dtype=torch.uint8)
        all_sums = torch.empty(self.ranks.world * 33, dtype=torch.uint8)
        dist.all_gather_into_tensor(all_sums, mine, group=self.talk)
        return {
            f"{SHARDS}/{shard_file(rank)}": bytes(row[1:].tolist()).hex()
            for rank, row in enumerate(all_sums.view(-1, 33))
            if row[0]
        }

    def _aside(self, step: int) -> Path:
        return self.folder / f"{checkpoint.ASIDE}step-{step}"


def _hash(file: Path, hashed: Future[str], written: Future[Any]) -> None:
    """Gives `hashed` the checksum of what this rank has written ("" for nothing), or the fault of the writer."""
    try:
        written.result()
        hashed.set_result(checkpoint.sha256(file) if file.is_file() else "")
    except BaseException as error:
        hashed.set_exception(error)


def _fresh(directory: Path) -> None:
    shutil.rmtree(directory.parent, ignore_errors=True)
    os.makedirs(directory)


def _refuse(aside: Path, final: Path, why: str) -> NoReturn:
    shutil.rmtree(aside, ignore_errors=True)
    raise checkpoint.NotSaved(
        f"checkpoint {final.name} could not be saved ({why}); the one before it stays: make room, then use --resume"
    )


def _said(fault: BaseException | None) -> str:
    """What failed where; PyTorch tells every rank of the failures of all."""
    if isinstance(fault, CheckpointException):
        return "; ".join(f"rank {rank}: {error}" for rank, (error, _) in sorted(fault.failures.items()))
    return str(fault)
