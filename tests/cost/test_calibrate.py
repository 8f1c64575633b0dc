"""Calibration: what is measured becomes a device; bad input overwrites nothing."""

import json

import pytest

from baleen.config import UserError
from baleen.cost import calibrate
from baleen.cost.calibration import Calibration
from baleen.cost.hardware import find_hardware
from baleen.cost.measured import Step, fit_products, fit_training, non_negative, workload
from baleen.cost.plan import make_plan
from baleen.cost.plan_request import Request
from baleen.cost.step import step_time
from baleen.recipe import Recipe

RATE, OPERANDS, CALL = 2e11, 3e10, 1e-5  # of the invented machine's products
SHAPES = [(m, n, k) for m in (64, 256, 1024) for n, k in ((128, 512), (512, 128), (1024, 1024))]
PRODUCTS = [(m, n, k, 2 * m * n * k / RATE + 4 * (m * k + k * n + m * n) / OPERANDS + CALL) for m, n, k in SHAPES]
MACHINE = {
    "memory_gb": 16.0, "memory_tb_s": 0.02, "threads": 2, "domain": 1, "peak_fp32": 0.2, "achieved_fp32": 0.2,
    "product_tb_s_fp32": 0.03, "product_call_us_fp32": 10.0, "attention_forward_tflops": 0.05,
    "attention_backward_tflops": 0.05,
}  # fmt: skip
TRUTH = {"streaming_tb_s": 0.05, "layer_overhead_us": 900.0, "copy_overhead_ns": 500.0, "update_tb_s": 0.015}


def steps(machine, peak=0.0):
    """Steps of the probes as a machine would take them by the engine's own account."""
    recipes = [Recipe.model_validate(raw) for raw in calibrate._probes()]
    on = find_hardware_of(machine)
    taken = [step_time(workload(Step(r, 1.0, 0.0, "fp32", None), on), Calibration()) for r in recipes]
    return [Step(r, t.seconds, t.phases["optimizer"], "fp32", peak) for r, t in zip(recipes, taken, strict=True)]


def find_hardware_of(cells):
    from baleen.cost.hardware import Hardware

    return Hardware.model_validate({"name": "m", "title": "m", "generation": "cpu", **cells})


MEASURED = {
    "products": {"fp32": PRODUCTS, "bf16": PRODUCTS},
    "bandwidth": 2e10,
    "attention_flops": [5e10, 5e10],
    "threads": 2,
    "torch": "2.13",
    "steps": [
        dict(s._asdict(), recipe=s.recipe.model_dump(mode="json"), peak_bytes=None) for s in steps({**MACHINE, **TRUTH})
    ],
}


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(calibrate, "measure", lambda seconds: json.loads(json.dumps(MEASURED)))


def test_rates_of_products_are_found_again():
    found = fit_products(PRODUCTS, 4)
    assert found.flops == pytest.approx(RATE) and found.call_seconds == pytest.approx(CALL)
    assert found.operand_bytes == pytest.approx(OPERANDS)


def test_what_only_training_shows_is_found_again():
    found = fit_training("m", MACHINE, steps({**MACHINE, **TRUTH}))
    for cell, value in {**MACHINE, **TRUTH}.items():
        assert found[cell] == pytest.approx(value, rel=0.01), cell


def test_no_rate_is_negative():
    import numpy as np

    found = non_negative(np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), np.array([3.0, 2.0, 1.0]))
    assert found.tolist() == pytest.approx([2.0, 0.0])


def test_a_measured_machine_is_a_device_like_any_other(tmp_path, measured):
    path = tmp_path / "own.toml"
    calibrate.calibrate(path, "laptop")
    calibrate.calibrate(path, "server")
    laptop = find_hardware("laptop", path)
    assert laptop.is_cpu and laptop.fastest_precision == "fp32"
    assert laptop.peak_flops("fp32") == pytest.approx(RATE, rel=1e-3)
    assert laptop.streaming_tb_s == pytest.approx(TRUTH["streaming_tb_s"], rel=0.05)
    assert "2 threads" in laptop.sources["peak_fp32"]
    assert find_hardware("server", path).name == "server"
    plan = make_plan(Request(gpu="laptop", model="cpu-s", gpus=1, hardware_files=(path,)))
    assert plan["precision"] == "fp32" and plan["micro_batch"] == 8
    assert "2 vCPU" in plan["usd_per_gpu_hour"]["source"]
    sets = ("update_tb_s=0.001",)
    slower = make_plan(Request(gpu="laptop", model="cpu-s", gpus=1, hardware_files=(path,), sets=sets))
    assert slower["phases"]["optimizer"] == pytest.approx(15 * plan["phases"]["optimizer"], rel=0.05)


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


@pytest.mark.slow
def test_this_machine_is_measured():
    measured = calibrate.measure(2.0)
    assert set(measured["products"]) == {"fp32", "bf16"}
    assert 1e8 < measured["bandwidth"] < 1e14
    assert len(measured["steps"]) == len(calibrate._probes())
    assert all(step["seconds"] > step["update_seconds"] > 0 for step in measured["steps"])
    assert all(step["peak_bytes"] is None for step in measured["steps"][1:])
