"""The chain of a step, link by link, and V3's published step."""

import pytest

from baleen.config import ModelConfig, UserError
from baleen.cost import kernels
from baleen.cost.architecture import from_dims, from_model_config
from baleen.cost.bubble import bubble_seconds, busy_seconds, stage_imbalance
from baleen.cost.calibration import Calibration, shipped_calibration
from baleen.cost.communication import exposed_seconds
from baleen.cost.flops import forward_flops, mtp_forward_flops, training_flops
from baleen.cost.hardware import find_hardware
from baleen.cost.layout import Layout
from baleen.cost.phases import published_step, schedule_phases
from baleen.cost.schedule import schedule
from baleen.cost.simulator import Durations, execute
from baleen.cost.step import ideal_seconds, jitter_factor, least_seconds, predict, rooflines, step_time
from baleen.cost.workload import Workload

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
    plan = predict(V3, shipped_calibration())
    assert 14.8e12 / plan["tokens_per_second_per_gpu"] / 3600 == pytest.approx(2.664e6, rel=0.1)
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
    step = step_time(V3, shipped_calibration())
    phases = schedule_phases(V3, shipped_calibration(), step)
    assert sum(phases.values()) == pytest.approx(step.seconds)
    published = published_step("v3-671b", "h800", V3)
    assert published is not None and set(phases) == set(published["phases"])
    assert phases["1F1B"] == pytest.approx(published["phases"]["1F1B"], rel=0.1)


def test_operations_that_run_alone_wait_for_their_all_to_all_and_pairs_do_not():
    slow = V3.model_copy(update={"hardware": V3.hardware.model_copy(update={"network_gb_s": 30.0})})
    fast, late = (schedule_phases(w, Calibration(), step_time(w, Calibration())) for w in (V3, slow))
    assert late["1F"] > 1.2 * fast["1F"] and late["1B"] > 1.1 * fast["1B"]
    assert late["1F1B"] == pytest.approx(fast["1F1B"], rel=0.01)


def test_the_grouped_factor_lengthens_the_weight_gradient():
    one, two = (schedule_phases(V3, c, step_time(V3, c))["1W"] for c in (Calibration(), Calibration({"grouped": 1.5})))
    assert two > 1.1 * one


def test_ideal_is_flops_over_peak():
    tokens, peak = 64 * 8192, 989e12
    assert ideal_seconds(DENSE) == pytest.approx(training_flops(DENSE.arch, 8192) * tokens / 8 / peak)
    in_fp8 = DENSE.model_copy(update={"precision": "fp8"})
    assert 0.5 < ideal_seconds(in_fp8) / ideal_seconds(DENSE) < 0.7


def test_scores_head_and_router_of_mtp_are_no_fp8_either():
    """One more layer of V3 and one more use of its head, at the rates of the others."""
    parts = forward_flops(V3.arch, 4096)
    core = parts["scores"] / 61 + parts["head"] + parts["router"] / 58
    linear = mtp_forward_flops(V3.arch, 4096) - core
    expected = 3 * (core / 989e12 + linear / 1979e12) * V3.tokens / 2048
    assert ideal_seconds(V3) - ideal_seconds(V3.model_copy(update={"mtp": False})) == pytest.approx(expected)


def test_products_approach_the_achieved_rate_as_they_grow():
    h100 = DENSE.hardware
    rates = [2 * n**3 / kernels.matmul_seconds(h100, "bf16", n, n, n) for n in (512, 4096, 65536)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(794e12, rel=0.02)
    thin = kernels.matmul_seconds(h100, "bf16", 1, 4096, 4096)  # one row: the weights come from memory
    assert thin == pytest.approx(2 * 4096**2 / (3.35e12 * h100.streaming_share), rel=0.01)


def test_communication_is_hidden_by_compute_only_as_far_as_there_is_compute():
    roof = rooflines(DENSE)
    constants = Calibration()
    plenty = exposed_seconds(roof.traffic, DENSE, constants, compute=1e9)["data"]
    none = exposed_seconds(roof.traffic, DENSE, constants, compute=0.0)["data"]
    assert plenty == pytest.approx(constants["data_exposed"] * roof.traffic.data)
    assert none == pytest.approx(roof.traffic.data)


def test_bubble_is_that_of_the_executed_schedule():
    plain, times = Layout(devices=8, pipeline=8), Durations(1.0, 2.0, 1.0)
    assert bubble_seconds(plain, 64, times) == pytest.approx(7 * 3.0)
    assert bubble_seconds(plain, 640, times) == pytest.approx(7 * 3.0)
    assert bubble_seconds(Layout(devices=8), 64, times) == 0
    interleaved = Layout(devices=8, pipeline=8, virtual_stages=4, schedule="interleaved")
    assert bubble_seconds(interleaved, 64, times) == pytest.approx(7 * 3.0 / 4)


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_work_is_that_of_the_executed_schedule_with_its_pairs(name):
    layout, times = Layout(devices=8, pipeline=8, schedule=name), Durations(1.0, 2.0, 1.0, overlap=0.8)
    share = layout.pipeline / (2 * layout.pipeline if name == "dualpipev" else layout.pipeline)
    executed = execute(schedule(name, 8, 40), Durations(share, 2 * share, share, overlap=0.8))
    assert busy_seconds(layout, 40, times) == pytest.approx(sum(executed.busy_seconds) / 8)
    assert busy_seconds(layout, 400, times) - busy_seconds(layout, 40, times) == pytest.approx(360 * 3 * 0.8)


def test_the_bound_is_below_the_step():
    for work in (V3, DENSE):
        assert least_seconds(work, Calibration(), rooflines(work)) <= step_time(work, Calibration()).seconds


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
