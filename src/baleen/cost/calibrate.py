"""Measures the machine this runs on, in subprocesses, and writes it as an entry of a hardware file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w

from baleen.config import UserError
from baleen.cost.hardware import parse_hardware
from baleen.cost.measured import Step, fit_products, fit_training
from baleen.recipe import Recipe

USUAL_SECONDS = 38.0
PROBE_SECONDS = 0.5  # a step of a probe, about: how many steps there is time for
# Freed memory is kept as training keeps it (glibc reads these), or page faults would be measured with every product.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 62),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


def calibrate(out: Path, name: str = "cpu", seconds: float = USUAL_SECONDS) -> dict[str, Any]:
    """Measures for about `seconds`, adds or replaces table `name` in the hardware file `out`; returns the measurement.

    One device of the entry is the whole machine. Raises UserError for an impossible name or time, or a broken file,
    which is then left as it is; RuntimeError if the measuring process fails.
    """
    if not 1 <= seconds <= 3600:
        raise UserError(f"calibrating for {seconds} seconds is absurd: give 1 to 3600")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) or name == "sources":
        raise UserError(f"{name!r} is no name for a device: use lower-case letters, digits, dots and dashes")
    raw = _existing(out)
    if not os.access(out.parent, os.W_OK):  # before the minutes of measuring
        raise UserError(f"{out} cannot be written there: make the folder, or give --out another place")
    measured = measure(seconds)
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


def measure(seconds: float) -> dict[str, Any]:
    """Operators before and after the training steps, for a machine's speed drifts: both halves count alike."""
    first = _run("baleen.train.operators", [str(seconds / 4)])
    probes = _probes()
    asked = {"steps": max(1, round(seconds / 2 / PROBE_SECONDS / len(probes))), "recipes": probes}
    steps = _run("baleen.train.probe", [], json.dumps(asked))
    second = _run("baleen.train.operators", [str(seconds / 4)])
    return {
        "products": {name: first["products"][name] + second["products"][name] for name in first["products"]},
        "bandwidth": (first["bandwidth"] + second["bandwidth"]) / 2,
        "attention_flops": [
            (a + b) / 2 for a, b in zip(first["attention_flops"], second["attention_flops"], strict=True)
        ],
        "threads": first["threads"],
        "torch": first["torch"],
        "steps": [{"recipe": recipe, **step} for recipe, step in zip(probes, steps, strict=True)],
    }


def hardware_entry(name: str, measured: dict[str, Any], memory: float) -> dict[str, Any]:
    """A table of hardware.toml. A CPU has no published peak: the rate that its products approach stands for it."""
    source = f"measured-{name}"
    cells: dict[str, float] = {
        "memory_gb": memory,
        "memory_tb_s": measured["bandwidth"] / 1e12,
        "threads": measured["threads"],
        "domain": 1,
    }
    for precision, products in measured["products"].items():
        rate = fit_products(products, 4 if precision == "fp32" else 2)
        cells[f"peak_{precision}"] = cells[f"achieved_{precision}"] = rate.flops / 1e12
        cells[f"product_call_us_{precision}"] = rate.call_seconds * 1e6
        if rate.operand_bytes:
            cells[f"product_tb_s_{precision}"] = rate.operand_bytes / 1e12
    for direction, flops in zip(("forward", "backward"), measured["attention_flops"], strict=True):
        cells[f"attention_{direction}_tflops"] = flops / 1e12
    steps = [
        Step(Recipe.model_validate(step["recipe"]), *(step[field] for field in Step._fields[1:]))
        for step in measured["steps"]
    ]
    cells = fit_training(name, cells, steps)
    entry: dict[str, Any] = {
        "title": f"{platform.processor() or platform.machine()}, {measured['threads']} threads",
        "generation": "cpu",
        "aliases": [],
    }
    return entry | {cell: [float(f"{value:.4g}") if value % 1 else int(value), source] for cell, value in cells.items()}


def memory_gb() -> float:
    """Physical memory of this machine in GB (1e9 bytes)."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def render(result: dict[str, Any]) -> str:
    """`calibrate`'s result as text."""
    cells = {name: cell[0] for name, cell in result["hardware"].items() if isinstance(cell, list) and cell}
    lines = [f"{result['hardware']['title']} as {result['name']!r} in {result['file']}"]
    lines += [f"  {name:<26}{value:>12,g}" for name, value in cells.items()]
    lines.append(f"use it with --hardware {result['file']} --gpu {result['name']} --gpus 1")
    return "\n".join(lines)


def _probes() -> list[dict[str, Any]]:
    """The recipes of data/probes.toml."""
    raw = tomllib.loads(resources.files("baleen.cost").joinpath("data/probes.toml").read_text(encoding="utf-8"))
    recipes = [{"model": {**raw["model"], **network}, "train": raw["train"]} for network in raw["network"]]
    return [Recipe.model_validate(recipe).model_dump(mode="json") for recipe in recipes]


def _run(module: str, arguments: list[str], stdin: str = "") -> Any:
    """The JSON that a measuring process prints."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        input=stdin, capture_output=True, text=True, check=False, env={**os.environ, **KEEP_FREED_MEMORY},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"measuring failed ({done.returncode}): {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def _existing(out: Path) -> dict[str, Any]:
    if not out.exists():
        return {}
    try:
        raw = tomllib.loads(out.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{out} cannot be read ({error.strerror}): give a TOML file with --out") from None
    except ValueError as error:  # of the syntax, of UTF-8, or a number of too many digits
        raise UserError(f"{out} is not valid TOML, so nothing is added to it: {error}") from None
    parse_hardware(raw, str(out))
    return raw
