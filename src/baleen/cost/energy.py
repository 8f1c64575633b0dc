"""Joules of a stage: measured where the machine tells, otherwise estimated from watts, and which of the two."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """`how` is "measured", "estimated" or "unknown"; `note` says by what."""

    how: str
    note: str

    def joules(self, device_seconds: float) -> float | None:
        """Energy since the meter was made, J; `device_seconds` allocated so far serve the estimate."""
        ...


class EstimatedMeter:
    """Watts of the rate card times device-seconds."""

    def __init__(self, watts_per_device: float | None) -> None:
        self.watts = watts_per_device
        self.how = "unknown" if watts_per_device is None else "estimated"
        self.note = (
            "the rate card names no draw" if watts_per_device is None else "draw of the rate card x device-hours"
        )

    def joules(self, device_seconds: float) -> float | None:
        return None if self.watts is None else self.watts * device_seconds


class RaplMeter:
    """Intel and AMD package counters under /sys/class/powercap: the sockets of this machine, whoever uses them.

    The counters wrap (at 100 W about every 44 minutes), so `joules` must be called more often than that.
    """

    how = "measured"
    note = "RAPL: all CPU packages of this machine, other programs included; without mainboard, disks and power supply"

    def __init__(self, packages: list[Path]) -> None:
        self.packages = packages
        self.range = [int((p / "max_energy_range_uj").read_text()) for p in packages]
        self.last = self._read()
        self.total_uj = 0

    def _read(self) -> list[int]:
        return [int((p / "energy_uj").read_text()) for p in self.packages]

    def joules(self, device_seconds: float) -> float:
        now = self._read()
        for before, after, wrap in zip(self.last, now, self.range, strict=True):
            self.total_uj += after - before if after >= before else after + wrap - before
        self.last = now
        return self.total_uj / 1e6


class CounterMeter:
    """Cumulative counters of this node's accelerators (mJ each), scaled to all devices of the stage."""

    how = "measured"

    def __init__(self, counters: list[Callable[[], float]], devices: int) -> None:
        self.counters = counters
        self.scale = devices / len(counters)
        self.start = sum(read() for read in counters)
        whole = "" if self.scale == 1 else f", scaled to {devices}"
        self.note = f"energy counters of {len(counters)} accelerators (zeus){whole}; without host, network and cooling"

    def joules(self, device_seconds: float) -> float:
        return (sum(read() for read in self.counters) - self.start) * self.scale / 1e3


class LastingMeter:
    """A meter that goes on by an estimate, from its last reading, where the machine's counters fail: that must cost
    nobody a row of the ledger or an answer."""

    def __init__(self, meter: Meter, watts_per_device: float | None) -> None:
        self._meter: Meter | None = meter
        self._estimate = EstimatedMeter(watts_per_device)
        self._joules: float | None = 0.0
        self._device_seconds = 0.0
        self.how, self.note = meter.how, meter.note

    def joules(self, device_seconds: float) -> float | None:
        if self._meter is not None:
            try:
                self._joules, self._device_seconds = self._meter.joules(device_seconds), device_seconds
                return self._joules
            except Exception as error:  # a driver's failure, of whatever kind
                print(f"warning: energy is estimated from here on ({error})", file=sys.stderr)
                self._meter, self.how, self.note = None, self._estimate.how, self._estimate.note
        more = self._estimate.joules(device_seconds - self._device_seconds)
        return None if self._joules is None or more is None else self._joules + more


def rapl_packages(root: Path = POWERCAP) -> list[Path]:
    """The readable package zones (`intel-rapl:0`, not its parts `intel-rapl:0:0`). Mostly only root may read."""
    found = []
    for zone in sorted(root.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:
            continue
        try:
            int((zone / "energy_uj").read_text())
            int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            continue
        found.append(zone)
    return found


def open_meter(device_name: str, devices: int, watts_per_device: float | None) -> Meter:
    """The best meter this machine offers for a stage on `devices` devices."""
    if device_name.lower() == "cpu":
        packages = rapl_packages()
        return RaplMeter(packages) if packages else EstimatedMeter(watts_per_device)
    counters = _zeus_counters()
    return CounterMeter(counters[:devices], devices) if counters else EstimatedMeter(watts_per_device)


def _zeus_counters() -> list[Callable[[], float]]:
    if find_spec("zeus") is None:
        return []
    from zeus.device import get_gpus  # type: ignore[import-not-found]

    gpus = get_gpus()
    return [lambda i=i: gpus.getTotalEnergyConsumption(i) for i in range(len(gpus))]
