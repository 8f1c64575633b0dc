"""Joules: measured by counters that wrap, estimated by watts, and never mixed up."""

from pathlib import Path

import pytest

from baleen.cost.energy import CounterMeter, EstimatedMeter, LastingMeter, RaplMeter, rapl_packages


def zone(root: Path, name: str, energy: int, wrap: int = 1000) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{wrap}\n")
    return folder


def test_rapl_adds_packages_and_survives_a_wrap(tmp_path):
    first, second = zone(tmp_path, "intel-rapl:0", 900), zone(tmp_path, "intel-rapl:1", 100)
    zone(tmp_path, "intel-rapl:0:0", 50)
    (tmp_path / "intel-rapl:2").mkdir()
    assert rapl_packages(tmp_path) == [first, second]
    meter = RaplMeter([first, second])
    assert meter.joules(0) == 0
    (first / "energy_uj").write_text("100")
    (second / "energy_uj").write_text("150")
    assert meter.joules(0) == pytest.approx((200 + 50) / 1e6)
    (first / "energy_uj").write_text("400")
    assert meter.joules(0) == pytest.approx((500 + 50) / 1e6)
    assert meter.how == "measured"


def test_no_counters_no_measurement(tmp_path):
    assert rapl_packages(tmp_path / "nothing") == []


def test_an_estimate_is_watts_times_device_seconds():
    meter = EstimatedMeter(3.5)
    assert (meter.joules(10), meter.how) == (35, "estimated")
    assert (EstimatedMeter(None).joules(10), EstimatedMeter(None).how) == (None, "unknown")


def test_a_meter_that_fails_is_estimated_on_from_its_last_reading(capsys):
    readings = iter([5.0, 9.0])
    meter = LastingMeter(CounterMeter([lambda: 1000 * next(readings)], devices=1), 2.0)
    assert (meter.joules(3), meter.how) == (4.0, "measured")
    assert (meter.joules(5), meter.how) == (4.0 + 2 * 2.0, "estimated")
    assert meter.joules(6) == 4.0 + 3 * 2.0
    assert capsys.readouterr().err.count("energy is estimated from here on") == 1


def test_a_node_stands_for_the_others():
    now = [1000.0, 5000.0]
    meter = CounterMeter([lambda: now[0], lambda: now[1]], devices=8)
    now[0] += 2000
    assert meter.joules(0) == pytest.approx(2.0 * 4)
    assert "scaled to 8" in meter.note
