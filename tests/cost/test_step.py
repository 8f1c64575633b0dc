"""The chain of a step, link by link, and V3's published step."""

import pytest

from baleen.config import ModelConfig, UserError
from baleen.cost import kernels
from baleen.cost.architecture import from_dims, from_model_config
from baleen.cost.calibration import Calibration, shipped_calibration
from baleen.cost.flops import training_flops
from baleen.cost.hardware import find_hardware
from baleen.cost.layout import Layout
from baleen.cost.step import (
    Workload,
    bubble_seconds,
    exposed_seconds,
    ideal_seconds,
    jitter_factor,
    phase_seconds,
    predict,
    rooflines,
    stage_imbalance,
    step_time,
)

V3 = Workload(
    arch=from_model_config(ModelConfig()),
    hardware=find_hardware("h800"),
    layout=Layout(devices=2048, pipeline=16, expert=64, zero=1, schedule="dualpipe", recompute="deepseek"),
    precision="fp8",
    seq_len=4096,
    global_batch=15360,
    mtp=True,
    node_limit=4,
)
DENSE = Workload(
    arch=from_dims(dict(L=32, d=4096, H=32, KV=8, hd=128, ff=14336, nm=3, V=128256)),
    hardware=find_hardware("h100"),
    layout=Layout(devices=8, zero=3, recompute="none"),
    seq_len=8192,
    global_batch=64,
)


def test_v3_hours_within_a_tenth_with_nothing_fitted_on_v3():
    plan = predict(V3, shipped_calibration(), 14.8e12)
    assert plan["gpu_hours_at_full_goodput"] == pytest.approx(2.664e6, rel=0.1)
    assert plan["step_seconds"] == pytest.approx(19.926, rel=0.1)


def test_the_chain_adds_up_and_only_grows():
    step = step_time(V3, shipped_calibration())
    assert [link.name for link in step.chain] == [
        "ideal", "kernels", "exposed communication", "bubble", "imbalance and jitter",
    ]  # fmt: skip
    assert sum(link.added for link in step.chain) == pytest.approx(step.seconds)
    assert all(link.added >= 0 for link in step.chain)
    assert sum(step.phases.values()) == pytest.approx(step.seconds)


def test_phases_of_the_schedule_fill_the_step():
    phases = phase_seconds(V3, shipped_calibration())
    assert {"F", "B", "W", "F&B", "bubble", "optimizer"} <= set(phases)
    assert sum(phases.values()) == pytest.approx(step_time(V3, shipped_calibration()).seconds)
    assert phases["F&B"] > sum(phases.values()) / 2


def test_ideal_is_flops_over_peak():
    tokens, peak = 64 * 8192, 989e12
    assert ideal_seconds(DENSE) == pytest.approx(training_flops(DENSE.arch, 8192) * tokens / 8 / peak)
    in_fp8 = DENSE.model_copy(update={"precision": "fp8"})
    assert 0.5 < ideal_seconds(in_fp8) / ideal_seconds(DENSE) < 0.7


def test_products_approach_the_achieved_rate_as_they_grow():
    h100 = DENSE.hardware
    rates = [2 * n**3 / kernels.matmul_seconds(h100, "bf16", n, n, n) for n in (512, 4096, 65536)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(794e12, rel=0.02)
    thin = kernels.matmul_seconds(h100, "bf16", 1, 4096, 4096)  # one row: the weights come from memory
    assert thin == pytest.approx(2 * 4096**2 / (3.35e12 * kernels.BANDWIDTH_SHARE), rel=0.01)


def test_communication_is_hidden_by_compute_only_as_far_as_there_is_compute():
    roof = rooflines(DENSE)
    constants = Calibration()
    plenty = exposed_seconds(roof, DENSE, constants, compute=1e9)["data"]
    none = exposed_seconds(roof, DENSE, constants, compute=0.0)["data"]
    assert plenty == pytest.approx(constants["data_exposed"] * roof.traffic.data)
    assert none == pytest.approx(roof.traffic.data)


def test_bubble_is_that_of_the_executed_schedule():
    plain = Layout(devices=8, pipeline=8)
    assert bubble_seconds(plain, 64, 1.0, 2.0, 1.0) == pytest.approx(7 * 3.0)
    assert bubble_seconds(plain, 640, 1.0, 2.0, 1.0) == pytest.approx(7 * 3.0)
    assert bubble_seconds(Layout(devices=8), 64, 1.0, 2.0, 1.0) == 0
    interleaved = Layout(devices=8, pipeline=8, virtual_stages=4, schedule="interleaved")
    assert bubble_seconds(interleaved, 64, 1.0, 2.0, 1.0) == pytest.approx(7 * 3.0 / 4)


def test_whole_layers_do_not_always_divide():
    assert stage_imbalance(Layout(devices=4, pipeline=4), layers=32, ends_in_layers=0.0) == pytest.approx(1.0)
    assert stage_imbalance(Layout(devices=4, pipeline=4), layers=33, ends_in_layers=0.0) > 1.05


def test_jitter_grows_with_doublings():
    constants = Calibration({"jitter": 0.01})
    assert jitter_factor(8, constants) == 1
    assert jitter_factor(2048, constants) == pytest.approx(1.08)


def test_forced_balance_takes_the_imbalance_out():
    free, forced = (
        step_time(V3.model_copy(update={"balanced_routing": b}), Calibration()).phases["imbalance"]
        for b in (False, True)
    )
    assert free > forced


def test_a_constant_can_be_changed_and_a_wrong_one_is_named():
    slower = step_time(V3, shipped_calibration().with_(jitter=0.05)).seconds
    assert slower > step_time(V3, shipped_calibration()).seconds
    with pytest.raises(UserError, match="did you mean 'jitter'"):
        Calibration({"jiter": 1.0})
    with pytest.raises(UserError, match="positive"):
        Calibration({"jitter": -1.0})
    with pytest.raises(UserError, match="positive number"):
        predict(V3, Calibration(), tokens=-1.0)
