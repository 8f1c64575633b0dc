"""The run directory: who may write there, the resolved recipe, and the rows of metrics.jsonl."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from baleen.config import Strict, UserError
from baleen.recipe import ParallelConfig, Recipe, read_recipe

RECIPE = "recipe.toml"
METRICS = "metrics.jsonl"
BEFORE_TRAINING = {RECIPE, "run_id", "data", "tensorboard", "wandb"}  # what a run makes until its first step
BEFORE_STAGES = {"tokenizer", "stages"}  # and one of post-training, with nothing in the folders of its stages


@contextmanager
def open_run(run_dir: Path, recipe: Strict, *, resume: bool) -> Iterator[None]:
    """Claim `run_dir` for this recipe, or find it claimed by the same one and resumed; nobody else writes meanwhile.

    A claim under which no step was trained, as bad input leaves it, is taken over.

    Raises UserError, having changed nothing, if the directory holds another run or other files, is not writable, or
    another process is at work in it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        directory = os.open(run_dir, os.O_RDONLY)
    except FileExistsError:
        raise UserError(f"{run_dir} is a file, it is not a run: choose another --run directory") from None
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written ({error}): choose another --run directory") from None
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however this process ends
        except BlockingIOError:
            raise UserError(f"another process is at work in {run_dir}: wait until it ends, or stop it") from None
        try:
            _claim(run_dir, recipe, resume)
        except OSError as error:
            raise UserError(f"{run_dir} cannot be written ({error}): choose another --run directory") from None
        yield
    finally:
        os.close(directory)


def _claim(run_dir: Path, recipe: Strict, resume: bool) -> None:
    file = run_dir / RECIPE
    if file.is_file():
        stored, asked = (_apart_from_layout(each) for each in (read_recipe(type(recipe), file), recipe))
        other = stored != asked
        # metrics.jsonl is there, and empty, before the first step ends
        paths = [path for path in run_dir.iterdir() if path.name != METRICS or path.stat().st_size]
        names = {path.name for path in paths if not path.name.startswith(".")}
        begun = names - BEFORE_TRAINING - BEFORE_STAGES or any(p.is_file() for p in run_dir.glob("stages/**/*"))
        if not begun and not other and "run_id" not in names and names - {RECIPE}:  # a user's own folder
            raise UserError(f"{run_dir} holds {min(names - {RECIPE})}, which is no run's: choose another --run")
        if not begun and (not other or "run_id" in names):  # without run_id it is a user's own file
            shutil.rmtree(run_dir / "tokenizer", ignore_errors=True)  # that of another recipe's words
            write_aside(file, recipe.to_toml())
            return
        if other:
            raise UserError(
                f"{run_dir} belongs to another recipe (its {_first_difference(stored, asked)} differs, see {file}): "
                "resume it with the settings that it has, or choose another --run directory"
            )
        if not resume:
            raise UserError(f"{run_dir} already holds this run: add --resume to continue it, or choose another --run")
        write_aside(file, recipe.to_toml())
        return
    if any(path.name != "run_id" for path in run_dir.iterdir()):
        raise UserError(f"{run_dir} holds something that is not a run: choose another --run directory")
    write_aside(file, recipe.to_toml())


def _first_difference(one: Strict, other: Strict) -> str:
    """The first key, as section.key, in which two unequal recipes of a kind differ."""
    for name in type(one).model_fields:
        ours, theirs = getattr(one, name), getattr(other, name)
        if ours != theirs:
            nested = isinstance(ours, Strict) and isinstance(theirs, Strict) and type(ours) is type(theirs)
            return f"{name}.{_first_difference(ours, theirs)}" if nested else name
    raise AssertionError("equal recipes")


def _apart_from_layout(recipe: Strict) -> Strict:
    """A run may be continued by more processes or fewer."""
    return recipe.model_copy(update={"parallel": ParallelConfig()}) if isinstance(recipe, Recipe) else recipe


def require_one_process(what: str) -> None:
    """Raises UserError under torchrun with several processes, which would all write to one run directory."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{what} runs in one process: start it without torchrun, or with --nproc-per-node 1")


def write_aside(file: Path, text: str) -> None:
    """Write a text file aside and rename it, so that a kill leaves the old one or the new one."""
    aside = file.with_name(f".{file.name}.aside")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)


class Metrics:
    """metrics.jsonl, one JSON object a step. Opened at step N, it first drops the rows past N."""

    def __init__(self, run_dir: Path, step: int):
        file = run_dir / METRICS
        kept = [row for row in read_metrics(run_dir) if row["step"] <= step]
        write_aside(file, "".join(json.dumps(row) + "\n" for row in kept))
        self._stream: IO[str] = file.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """A number that is not finite becomes null, for JSON has none."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The whole rows of metrics.jsonl; a line torn by a kill is left out. No file: no rows."""
    file = run_dir / METRICS
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
