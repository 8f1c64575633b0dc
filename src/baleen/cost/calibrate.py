"""Measures the machine this runs on, in a subprocess, and writes it as an entry of a hardware file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from baleen.config import UserError
from baleen.cost.hardware import parse_hardware

USUAL_SECONDS = 40.0


def calibrate(out: Path, name: str = "this-machine", seconds: float = USUAL_SECONDS) -> dict[str, Any]:
    """Measures for about `seconds`, adds or replaces table `name` in the hardware file `out`; returns the measurement.

    One device of the entry is the whole machine. Raises UserError for an impossible name or time, or a broken file,
    which is then left as it is; RuntimeError if the measuring process fails.
    """
    if not 1 <= seconds <= 3600:
        raise UserError(f"calibrating for {seconds} seconds is absurd: give 1 to 3600")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) or name == "sources":
        raise UserError(f"{name!r} is no name for a device: use lower-case letters, digits, dots and dashes")
    raw = _existing(out)
    measured = run_worker(seconds)
    raw.setdefault("sources", {})[f"measured-{name}"] = {
        "title": f"baleen cost calibrate, {platform.node()}, {measured['threads']} threads, torch {measured['torch']}",
        "date": datetime.date.today().isoformat(),
    }
    raw[name] = hardware_entry(name, measured, memory_gb())
    parse_hardware(raw, str(out))
    partial = out.with_name(out.name + ".partial")
    partial.write_text(tomli_w.dumps(raw), encoding="utf-8")
    partial.replace(out)
    return {"name": name, "file": str(out), "measured": measured, "hardware": raw[name]}


def run_worker(seconds: float) -> dict[str, Any]:
    """The measuring process's JSON."""
    command = [sys.executable, "-m", "baleen.cost.calibrate_worker", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring failed ({done.returncode}): {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def hardware_entry(name: str, measured: dict[str, Any], memory: float) -> dict[str, Any]:
    """A table of hardware.toml. A CPU has no published matrix peak: the best rate measured stands for it."""
    source = f"measured-{name}"
    entry: dict[str, Any] = {
        "title": f"{platform.processor() or platform.machine()}, {measured['threads']} threads",
        "generation": "cpu",
        "aliases": [],
        "memory_gb": [round(memory, 2), source],
        "memory_tb_s": [float(f"{measured['bandwidth'] / 1e12:.4g}"), source],
        "op_overhead_us": [float(f"{measured['op_overhead_seconds'] * 1e6:.3g}"), source],
        "domain": [1, source],
    }
    for precision, rates in measured["matmul_flops"].items():
        best = float(f"{max(rates.values()) / 1e12:.4g}")
        entry[f"peak_{precision}"] = [best, source]
        entry[f"achieved_{precision}"] = [best, source]
    return entry


def memory_gb() -> float:
    """Physical memory of this machine in GB (1e9 bytes)."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def render(result: dict[str, Any]) -> str:
    """`calibrate`'s result as text."""
    measured = result["measured"]
    lines = [f"{result['hardware']['title']} as {result['name']!r} in {result['file']}"]
    for precision, rates in measured["matmul_flops"].items():
        lines += [f"  matmul {precision} {shape:<16}{rate / 1e9:>9.1f} GFLOP/s" for shape, rate in rates.items()]
    lines.append(f"  memory{measured['bandwidth'] / 1e9:>28.1f} GB/s")
    lines.append(f"  a small operator{measured['op_overhead_seconds'] * 1e6:>18.2f} us")
    lines.append(f"use it with --hardware {result['file']} --gpu {result['name']}")
    return "\n".join(lines)


def _existing(out: Path) -> dict[str, Any]:
    if not out.exists():
        return {}
    try:
        raw = tomllib.loads(out.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{out} is not valid TOML, so nothing is added to it: {error}") from None
    parse_hardware(raw, str(out))
    return raw
