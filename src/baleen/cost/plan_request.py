"""What is asked of a plan, as the command line or a program says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baleen.config import UserError
from baleen.cost.quantities import parse_count, parse_dollars, parse_megawatt_hours, parse_seconds

MOST_DEVICES = 131_072


@dataclass(frozen=True)
class Request:
    """What is asked for. None: to be solved for, or the model's and table's usual value. Batch in sequences."""

    gpu: str
    model: str | None = None
    tokens: float | None = None
    gpus: int | None = None
    layout: str | None = None
    search: bool = False
    budget_usd: float | None = None
    deadline_seconds: float | None = None
    energy_mwh: float | None = None
    batch: int | None = None
    seq_len: int | None = None
    precision: str | None = None
    usd_per_hour: float | None = None
    law: str | None = None  # of sizes: deepseek, unless told
    sets: tuple[str, ...] = ()
    hardware_files: tuple[Path, ...] = ()


def parse_request(
    gpu: str,
    model: str | None = None,
    tokens: str | None = None,
    gpus: str | None = None,
    budget: str | None = None,
    deadline: str | None = None,
    energy: str | None = None,
    batch: str | None = None,
    **rest: Any,
) -> Request:
    """The command line's words -> Request. Raises UserError for what is no quantity, or an absurd one."""
    devices = None if gpus is None else parse_count(gpus, "--gpus")
    sequences = None if batch is None else parse_count(batch, "--batch")
    for name, value in (("--gpus", devices), ("--batch", sequences)):
        if value is not None and (value != int(value) or value > MOST_DEVICES):
            raise UserError(f"{name} {value:g} is no whole number up to {MOST_DEVICES:,}")
    count = None if tokens is None else parse_count(tokens, "--tokens")
    if count is not None and not 1 <= count <= 1e18:
        raise UserError(f"--tokens {tokens} is absurd: all text ever written is below 1e16 tokens")
    return Request(
        gpu=gpu,
        model=model,
        tokens=count,
        gpus=None if devices is None else int(devices),
        budget_usd=None if budget is None else parse_dollars(budget, "--budget"),
        deadline_seconds=None if deadline is None else parse_seconds(deadline, "--deadline"),
        energy_mwh=None if energy is None else parse_megawatt_hours(energy, "--energy"),
        batch=None if sequences is None else int(sequences),
        **rest,
    )
