"""Experiment trackers behind one small face. Nothing leaves the machine unless the user names one that sends."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from baleen.config import UserError

TrackerKind = Literal["none", "tensorboard", "trackio", "wandb"]


class Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the numbers of one step; steps ascend."""
        ...

    def close(self) -> None:
        """Writes out what is pending. Nothing may be logged afterwards."""
        ...


def check_tracker(kind: str) -> None:
    """Raises UserError for a kind that `open_tracker` does not know, or whose package is not installed."""
    if kind not in get_args(TrackerKind):
        raise UserError(f"no tracker {kind!r}: take one of {', '.join(get_args(TrackerKind))}")
    if kind != "none":
        _package(kind)


def open_tracker(kind: TrackerKind, run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    """The tracker of that kind for the run in `run_dir`; `config` is the resolved recipe, shown beside the curves.

    `none` records nothing. TensorBoard writes into run_dir/tensorboard and trackio into its own folder, both on this
    machine. wandb sends to its server. Raises UserError as `check_tracker` does.
    """
    check_tracker(kind)
    if kind == "none":
        return _NoTracker()
    return _TensorBoard(run_dir, config) if kind == "tensorboard" else _Wandb(kind, run_dir, config)


class _NoTracker:
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard:
    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._writer = _package("tensorboard").SummaryWriter(str(run_dir / "tensorboard"))
        lines = (f"    {key} = {value!r}" for key, value in _flat(config).items())  # indented: Markdown's verbatim
        self._writer.add_text("recipe", "\n".join(lines))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """wandb, or trackio, which answers to the same calls."""

    def __init__(self, kind: Literal["trackio", "wandb"], run_dir: Path, config: Mapping[str, Any]) -> None:
        package = _package(kind)
        own = {"dir": str(run_dir)} if kind == "wandb" else {}
        with redirect_stdout(sys.stderr):  # stdout is for results, and trackio prints its greetings there
            self._run = package.init(project="baleen", name=run_dir.resolve().name, config=_flat(config), **own)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._run.finish()


def _package(kind: str) -> Any:
    module = "torch.utils.tensorboard" if kind == "tensorboard" else kind
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, kind):
            raise  # the package is there, and broken
        raise UserError(
            f"--track {kind} needs the package {kind}: pip install 'baleen-lm[track]', or take --track none"
        ) from None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out
