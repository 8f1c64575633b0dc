"""Calibration: what is measured becomes a device; bad input overwrites nothing."""

import pytest

from baleen.config import UserError
from baleen.cost import calibrate
from baleen.cost.hardware import find_hardware

MEASURED = {
    "matmul_flops": {"fp32": {"a": 5.0e10, "b": 8.0e10}, "bf16": {"a": 9.0e10, "b": 7.0e10}},
    "bandwidth": 1.2e10,
    "op_overhead_seconds": 2.5e-6,
    "threads": 2,
    "torch": "2.13",
}


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(calibrate, "run_worker", lambda seconds: MEASURED)


def test_a_measured_machine_is_a_device_like_any_other(tmp_path, measured):
    path = tmp_path / "own.toml"
    calibrate.calibrate(path, "laptop")
    calibrate.calibrate(path, "server")
    laptop = find_hardware("laptop", path)
    assert laptop.is_cpu
    assert laptop.peak_flops("fp32") == 8.0e10
    assert laptop.peak_flops("bf16") == 9.0e10
    assert laptop.memory_tb_s == 0.012
    assert laptop.op_overhead_us == 2.5
    assert "2 threads" in laptop.sources["peak_fp32"]
    assert find_hardware("server", path).name == "server"


@pytest.mark.parametrize(("name", "seconds"), [("Bad Name", 10), ("sources", 10), ("fine", -1), ("fine", 1e9)])
def test_bad_input_writes_nothing(tmp_path, measured, name, seconds):
    with pytest.raises(UserError):
        calibrate.calibrate(tmp_path / "own.toml", name, seconds)
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_left_as_it_is(tmp_path, measured):
    path = tmp_path / "own.toml"
    path.write_text("broken = ")
    with pytest.raises(UserError, match="not valid TOML"):
        calibrate.calibrate(path)
    assert path.read_text() == "broken = "


def test_the_worker_measures_this_machine():
    measured = calibrate.run_worker(1.0)
    assert set(measured["matmul_flops"]) == {"fp32", "bf16"}
    assert 1e9 < max(measured["matmul_flops"]["fp32"].values()) < 1e15
    assert 1e8 < measured["bandwidth"] < 1e14
    assert 0 < measured["op_overhead_seconds"] < 1
