"""Resumable state that survives: checkpoints/step-N/ is written aside, checksummed, then renamed.

step-N/model.safetensors       weights and buffers, our names
       ema.safetensors         their moving average, if kept
       optimizer.safetensors   optimizer state by parameter name
       state.json              counters, loader position, RNG, thread count, library versions
       manifest.json           sha256 of each file

Several processes write shards/ in place of the three groups of tensors (`baleen.parallel.state`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch

from baleen.config import UserError, read_json
from baleen.interop.shards import sync
from baleen.parallel.state import SHARDS, Groups, Shapes, copy_piece, read_shards, require_shape, stored_shapes

MANIFEST = "manifest.json"
ASIDE, OLD = ".aside-", ".old-"  # before the name of a checkpoint on its way in, and out


class TornCheckpoint(Exception):
    """A checkpoint whose files are missing, cut off or altered."""


class NotSaved(UserError):
    """A checkpoint that the disk refused; those before it stay."""


class Stored(Protocol):
    """A checkpoint that can be continued from."""

    @property
    def step(self) -> int: ...

    @property
    def state(self) -> dict[str, Any]: ...

    def names(self, group: str) -> list[str]:
        """Of the tensors of a group: model, optimizer or ema."""
        ...

    def read_into(self, groups: Groups) -> None:
        """Fill these tensors, or what lies here of DTensors. Raises UserError for one that is missing or misshapen."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """What one step leaves behind: named groups of tensors and a JSON-able state."""

    step: int
    tensors: Groups
    state: dict[str, Any]

    def names(self, group: str) -> list[str]:
        return list(self.tensors.get(group, {}))

    def read_into(self, groups: Groups) -> None:
        for group, tensors in groups.items():
            for name, target in tensors.items():
                whole = self.tensors.get(group, {}).get(name)
                require_shape(name, None if whole is None else whole.shape, target.shape)
                assert whole is not None
                copy_piece(target, whole)


@dataclass(frozen=True)
class ShardedCheckpoint:
    """One that several processes wrote: a folder of shards. Read by all ranks together."""

    step: int
    directory: Path
    state: dict[str, Any]

    @cached_property
    def shapes(self) -> Shapes:
        return stored_shapes(self.directory)

    def names(self, group: str) -> list[str]:
        return list(self.shapes.get(group, {}))

    def read_into(self, groups: Groups) -> None:
        read_shards(self.directory, groups, self.shapes)


def save(folder: Path, checkpoint: Checkpoint, *, keep: int) -> None:
    """Write `folder`/step-N and drop all but the `keep` newest.

    Raises NotSaved if the disk refuses it: what was written is removed, and the checkpoints before it stay.
    """
    final = folder / f"step-{checkpoint.step}"
    aside = folder / f"{ASIDE}step-{checkpoint.step}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, tensors in checkpoint.tensors.items():
            contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            safetensors.torch.save_file(contiguous, aside / f"{name}.safetensors")
        (aside / "state.json").write_text(json.dumps(checkpoint.state))
        sums = {file.name: sha256(file) for file in sorted(aside.iterdir())}
        publish(aside, final, sums, keep=keep)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise NotSaved(f"checkpoint {final.name} could not be saved ({error}); the one before it stays") from error


def publish(aside: Path, final: Path, sums: dict[str, str], *, keep: int) -> None:
    """The end of a save: what was written aside, with these checksums, takes its name; old ones go. Raises OSError."""
    (aside / MANIFEST).write_text(json.dumps(sums, indent=1))
    for file in [*aside.rglob("*"), aside]:
        sync(file)
    old, folder = final.with_name(f"{OLD}{final.name}"), final.parent
    if final.exists():
        final.rename(old)
    aside.rename(final)
    sync(folder)
    shutil.rmtree(old, ignore_errors=True)
    steps, step = saved_steps(folder), int(final.name.removeprefix("step-"))
    kept = [number for number in steps if number <= step][-keep:]  # a later one was passed over as torn
    for number in set(steps) - set(kept):
        shutil.rmtree(folder / f"step-{number}")


def load(folder: Path, step: int) -> Stored:
    """Raises TornCheckpoint unless every file is there and has the checksum it was written with."""
    directory = folder / f"step-{step}"
    require_whole(directory, manifest(directory))
    try:
        return open_step(folder, step)
    except (UserError, safetensors.SafetensorError) as error:
        raise TornCheckpoint(str(error)) from error


def manifest(directory: Path) -> dict[str, str]:
    """{file: sha256} of a checkpoint. Raises TornCheckpoint."""
    try:
        sums = read_json(directory / MANIFEST)
    except UserError as error:
        raise TornCheckpoint(str(error)) from error
    if "state.json" not in sums:
        raise TornCheckpoint(f"{directory / MANIFEST} does not list state.json")
    return sums


def require_whole(directory: Path, sums: Mapping[str, str]) -> None:
    """Raises TornCheckpoint unless these files of a checkpoint are there and have these checksums."""
    for name, expected in sums.items():
        if not (directory / name).is_file():
            raise TornCheckpoint(f"{directory / name} is missing")
        if sha256(directory / name) != expected:
            raise TornCheckpoint(f"{directory / name} is torn or altered: its checksum differs")


def open_step(folder: Path, step: int) -> Stored:
    """A checkpoint that was found whole."""
    directory = folder / f"step-{step}"
    state = read_json(directory / "state.json")
    if (directory / SHARDS).is_dir():
        return ShardedCheckpoint(step, directory / SHARDS, state)
    names = [name.removesuffix(".safetensors") for name in manifest(directory) if name.endswith(".safetensors")]
    return Checkpoint(step, {n: safetensors.torch.load_file(directory / f"{n}.safetensors") for n in names}, state)


def load_newest(folder: Path, warn) -> Stored | None:
    """The newest whole checkpoint; `warn(message)` names each torn one that is passed over. None if there is none.

    Raises UserError if there are checkpoints and none is whole.
    """
    for step in reversed(saved_steps(folder)):
        try:
            return load(folder, step)
        except TornCheckpoint as error:
            warn(passed_over(step, error))
    if saved_steps(folder):
        raise UserError(none_whole(folder))
    return None


def passed_over(step: int, why: object) -> str:
    """A warning."""
    return f"checkpoint step-{step} is passed over: {why}"


def none_whole(folder: Path) -> str:
    """An error, of a folder with torn checkpoints alone."""
    return f"no checkpoint in {folder} is whole: remove that folder to train from the start"


def tidy(folder: Path) -> None:
    """Removes what killed saves left, once no save is under way; a step whose new copy was not yet there stays."""
    for aside in folder.glob(f"{ASIDE}step-*"):
        shutil.rmtree(aside)
    for old in folder.glob(f"{OLD}step-*"):
        final = folder / old.name.removeprefix(OLD)
        shutil.rmtree(old) if final.exists() else old.rename(final)


def saved_steps(folder: Path) -> list[int]:
    """Steps with a checkpoint, oldest first; what was left aside by a kill does not count."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
