"""When checkpoints are written: at once by one process, beside the training by several."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from baleen.config import UserError
from baleen.parallel.ranks import Ranks
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

    def standing(self, step: int) -> str:
        """In words, whether what was trained up to `step` is on the disk."""
        return "and saved" if step == self.saved_step else f"and NOT saved; step {self.saved_step} is the last that is"


class TeamSaver(Saver):
    """Checkpoints of several processes: `save` copies tensors aside, `settle` publishes what all ranks have written.

    All ranks call every method together. One that cannot be saved ends the run: NotSaved is raised on rank 0, and the
    others end without a word.
    """

    def __init__(self, folder: Path, *, keep: int, warn: Callable[[str], None], ranks: Ranks):
        super().__init__(folder, keep=keep, warn=warn)
        self.ranks = ranks
        talk = dist.new_group(backend="gloo")
        assert isinstance(talk, dist.ProcessGroup)
        self.talk = talk
        self._pending: tuple[Checkpoint, Future[Any]] | None = None

    def newest(self) -> Stored | None:
        """Every rank reads a share of the files: a checkpoint of terabytes would keep the others waiting for one."""
        lead = self.ranks.rank == 0
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
        self._pending = taken, begin_save(self._aside(taken.step) / SHARDS, taken.tensors, self.talk)

    def settle(self, *, wait: bool) -> None:
        if self._pending is None:
            return
        taken, future = self._pending
        while self.ranks.largest([float(not future.done())])[0]:
            if not wait:
                return
            time.sleep(POLL_SECONDS)
        self._pending = None
        aside, final = self._aside(taken.step), self.folder / f"step-{taken.step}"
        fault = future.exception()
        mine = aside / SHARDS / shard_file(self.ranks.rank)
        digest = b"" if fault or not mine.is_file() else bytes.fromhex(checkpoint.sha256(mine))
        if self.ranks.largest([float(fault is not None)])[0]:
            self.ranks.lead(lambda: _refuse(aside, final, _said(fault)))
        sums = self._gather(digest)
        self.ranks.lead(lambda: self._publish(aside, final, taken, sums))
        self.saved_step = taken.step

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
        return self.folder / f".aside-step-{step}"


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
