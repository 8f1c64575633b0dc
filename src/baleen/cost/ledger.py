"""The ledger: one append-only file a run, outside the run directory, so that no crash or deletion hides a cost.

    with Ledger.open(run_dir, project="p").stage("pretrain", purpose="research", devices=2, device_name="cpu",
                                                 rate=rate_card("cpu")) as stage:
        stage.progress(tokens=n, productive_seconds=s)

Every row carries the cumulative state of its stage, so the last row of a stage is its account: nothing is summed up
from rows, a torn line loses at most one beat, and a killed stage is known up to its last beat.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from baleen.config import UserError
from baleen.cost.energy import LastingMeter, Meter, open_meter
from baleen.cost.money import RateCard

StageName = Literal["data", "tokenizer", "pretrain", "extend", "sft", "rl", "distill", "eval", "serve", "export"]
Purpose = Literal["research", "ablation", "failed", "final"]
STAGES: tuple[str, ...] = get_args(StageName)
PURPOSES: tuple[str, ...] = get_args(Purpose)
BEAT_SECONDS = 20.0
RUN_ID = re.compile(r"[A-Za-z0-9._-]+-[0-9a-f]{8}")


def lab_of(run_dir: Path) -> Path:
    """The lab's folder: $BALEEN_LAB, or the parent of the run directory."""
    lab = os.environ.get("BALEEN_LAB")
    return Path(lab) if lab else run_dir.absolute().parent


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line by a single write. A torn line before it is closed off first. Raises OSError."""
    data = (json.dumps(row, allow_nan=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            data = b"\n" + data
        if os.write(fd, data) != len(data):
            raise OSError(f"{path}: the row was written in part")
        os.fsync(fd)
    finally:
        os.close(fd)


class Ledger:
    """The ledger of one run. `rank` other than 0 writes nothing."""

    def __init__(self, run_id: str, run: str, path: Path, project: str, rank: int) -> None:
        self.run_id, self.run, self.path, self.project, self.rank = run_id, run, path, project, rank

    @classmethod
    def open(
        cls, run_dir: Path | str, *, project: str = "default", lab: Path | str | None = None, rank: int = 0
    ) -> Self:
        """The ledger of `run_dir`, which gets a file `run_id` if it has none yet (a new directory is a new run).

        Raises UserError if the file run_id is damaged, or the run is called `ledger` (the folder of the ledgers).
        """
        run_dir = Path(run_dir).absolute()
        if run_dir.name == "ledger":
            raise UserError(f"{run_dir}: 'ledger' is the folder of the ledgers; give the run another name")
        if not project.strip():
            raise UserError("the project's name is empty: set cost.project")
        run_id = "" if rank else read_run_id(run_dir) or _new_run_id(run_dir)
        folder = (Path(lab) if lab else lab_of(run_dir)) / "ledger"
        return cls(run_id, run_dir.name, folder / f"{run_id}.jsonl", project, rank)

    def stage(
        self,
        name: StageName,
        *,
        purpose: Purpose = "research",
        devices: int,
        device_name: str,
        rate: RateCard,
        plan: Mapping[str, float] | None = None,
        beat_seconds: float = BEAT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        meter: Meter | None = None,
    ) -> Stage:
        """A context manager that accounts for `devices` devices from its beginning to its end.

        `plan` may hold the device_hours, usd and joules that were planned, for `baleen cost report` to compare.
        Raises UserError on an unknown stage or purpose, or an impossible number of devices.
        """
        if name not in STAGES:
            raise UserError(f"unknown stage {name!r}: choose one of {', '.join(STAGES)}")
        check_purpose(purpose)
        if not 1 <= devices <= 10_000_000:
            raise UserError(f"a stage on {devices} devices is absurd: give 1 to 10,000,000")
        return Stage(self, name, purpose, devices, device_name, rate, plan, beat_seconds, clock, meter)


@dataclass
class Stage:
    """A stage that is running. Figures are cumulative for this stage; a resumed stage is a new one with a `parent`."""

    ledger: Ledger
    name: str
    purpose: str
    devices: int
    device_name: str
    rate: RateCard
    plan: Mapping[str, float] | None
    beat_seconds: float
    clock: Callable[[], float]
    meter: Meter | None
    tokens: int = 0
    productive_seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    status: str = "running"
    stage_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    parent: str | None = None
    usd_before: float = 0.0  # what earlier stages of this name cost the run, those that it resumes among them

    def __enter__(self) -> Self:
        self._started = self.clock()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._sigterm: Any = None
        if self.meter is None:
            self.meter = open_meter(self.device_name, self.devices, self.rate.watts_per_device)
        self.meter = LastingMeter(self.meter, self.rate.watts_per_device)
        if self.ledger.rank == 0:
            try:
                self.parent, self.usd_before = _earlier(self.ledger.path, self.name)
                self._append("start")
            except OSError as error:
                raise UserError(f"the ledger cannot be written ({error}): free the disk or set BALEEN_LAB") from None
            self._thread = threading.Thread(target=self._beats, name="ledger", daemon=True)
            self._thread.start()
            self._catch_sigterm()
        return self

    def progress(self, *, tokens: int, productive_seconds: float, parts: Mapping[str, float] | None = None) -> None:
        """Tokens trained and wall seconds of steps that count, since this stage began. Cheap: call it each step.

        parts: the productive seconds by what they went into, such as {"rollout": 3.0, "update": 1.0}.
        """
        self.tokens, self.productive_seconds = tokens, productive_seconds
        self.parts = dict(parts or {})

    def interrupted(self) -> None:
        """Say that the stage ends because somebody stopped it, for loops that end without an exception."""
        self.status = "interrupted"

    @property
    def seconds(self) -> float:
        return self.clock() - self._started

    @property
    def device_seconds(self) -> float:
        """Allocated so far."""
        return self.seconds * self.devices

    @property
    def usd(self) -> float:
        return self.device_seconds / 3600 * self.rate.usd_per_device_hour

    @property
    def usd_of_run(self) -> float:
        """This stage and all of its name before it: what a resumed run has cost so far."""
        return self.usd_before + self.usd

    @property
    def joules(self) -> float | None:
        assert self.meter is not None
        with self._lock:
            return self.meter.joules(self.device_seconds)

    def beat(self) -> None:
        """Write the state now. A full disk is a warning: the next row carries everything again."""
        self._append_or_warn("beat")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.ledger.rank:
            return
        self._stop.set()
        self._thread.join()
        if self._sigterm is not None and signal.getsignal(signal.SIGTERM) is self._sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if kind is not None:
            self.status = "interrupted" if issubclass(kind, KeyboardInterrupt | SystemExit) else "failed"
        elif self.status == "running":
            self.status = "done"
        self._append_or_warn("end")

    def _beats(self) -> None:
        while not self._stop.wait(self.beat_seconds):
            self.beat()

    def _append_or_warn(self, event: str) -> None:
        try:
            self._append(event)
        except OSError as error:
            print(f"warning: the ledger could not be written ({error})", file=sys.stderr)

    def _append(self, event: str) -> None:
        assert self.meter is not None
        seconds = self.seconds
        joules = self.joules  # first: where the meter fails, `how` changes
        row = {
            "row_id": uuid.uuid4().hex[:12],
            "stage_id": self.stage_id,
            "event": event,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "monotonic_seconds": seconds,
            "project": self.ledger.project,
            "run": self.ledger.run,
            "stage": self.name,
            "purpose": self.purpose,
            "devices": self.devices,
            "device_name": self.device_name,
            "device_seconds": seconds * self.devices,
            "productive_device_seconds": self.productive_seconds * self.devices,
            "tokens": self.tokens,
            "joules": joules,
            "energy_how": self.meter.how,
            "energy_note": self.meter.note,
            "rate": self.rate.to_dict(),
            "status": self.status,
            "parent": self.parent,
        }
        if self.parts:
            row["productive_device_seconds_by_part"] = {k: s * self.devices for k, s in self.parts.items()}
        if self.plan is not None:
            row["plan"] = dict(self.plan)
        append_row(self.ledger.path, row)

    def _catch_sigterm(self) -> None:
        """A scheduler's SIGTERM would end the process without an end row; as SystemExit it passes through __exit__."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._sigterm = lambda number, frame: sys.exit(128 + number)
            signal.signal(signal.SIGTERM, self._sigterm)


def check_purpose(purpose: str) -> None:
    if purpose not in PURPOSES:
        raise UserError(f"unknown purpose {purpose!r}: choose one of {', '.join(PURPOSES)}")


def read_run_id(run_dir: Path) -> str | None:
    """The run's id, None if the directory has none. Raises UserError if the file holds something else."""
    try:
        text = (run_dir / "run_id").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{run_dir / 'run_id'} cannot be read: {error}") from None
    if not RUN_ID.fullmatch(text):
        raise UserError(f"{run_dir / 'run_id'} is damaged: write into it the name of its ledger file, without .jsonl")
    return text


def _new_run_id(run_dir: Path) -> str:
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", run_dir.name).strip(".-") or "run"
    run_id = f"{slug}-{uuid.uuid4().hex[:8]}"
    aside = run_dir / f".run_id.{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        aside.write_text(run_id + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written ({error.strerror}): choose another run directory") from None
    try:
        os.link(aside, run_dir / "run_id")  # fails where a process beside us was first; then its id is the run's
    except FileExistsError:
        run_id = read_run_id(run_dir) or run_id
    except OSError as error:
        raise UserError(
            f"{run_dir} is on a file system without hard links ({error.strerror}), such as an object store: "
            "keep runs on a POSIX one"
        ) from None
    finally:
        aside.unlink()
    return run_id


def _earlier(path: Path, name: str) -> tuple[str | None, float]:
    """The last stage of this name in a ledger, and the USD of all of them: of each its last row."""
    last: dict[str, float] = {}
    for row in read_rows(path)[0]:
        stage_id, rate = row.get("stage_id"), row.get("rate")
        if row.get("stage") != name or not isinstance(stage_id, str):
            continue
        seconds = row.get("device_seconds")
        usd = rate.get("usd_per_device_hour") if isinstance(rate, dict) else None
        last.pop(stage_id, None)
        last[stage_id] = 0.0
        if isinstance(seconds, int | float) and isinstance(usd, int | float):
            last[stage_id] = seconds / 3600 * usd
    return next(reversed(last), None), sum(last.values())


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of an append-only file, and how many lines were torn. No file: no rows."""
    rows, torn = [], 0
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn += 1
    return rows, torn
