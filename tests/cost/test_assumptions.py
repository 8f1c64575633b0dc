"""What docs/cost-method.md says of each factor is what the engine takes, and each can be set where it acts."""

import math
import re
from pathlib import Path

import pytest

from baleen.config import UserError
from baleen.cost.assumptions import NOT_OF_A_PLAN, load_assumptions, split_sets
from baleen.cost.calibration import CONSTANTS, shipped_calibration
from baleen.cost.factors import factor_table
from baleen.cost.hardware import find_hardware
from baleen.cost.plan import make_plan
from baleen.cost.plan_request import parse_request
from baleen.cost.project import project_cost
from baleen.cost.rates import device_rates
from baleen.cost.report import lab_report

DOC = (Path(__file__).parents[2] / "docs" / "cost-method.md").read_text(encoding="utf-8")
NAMED = re.findall(r"^\| `([a-z_0-9]+)` \|", DOC, re.M)
# Of a plan with DualPipe on Hopper, in FP8: what belongs to other devices and schedules is tried elsewhere.
ELSEWHERE = {"matmul_ampere", "matmul_blackwell", "tensor_exposed", "expert_exposed", "data_exposed"}

# As they are, prefill waits for the network and decode for memory; these limit it only when they are larger.
SERVING_WAITS_FOR_MORE = {"prompt_tokens", "redundant_experts", "stream_tokens_per_second"}


def without_sets(plan):
    return {key: value for key, value in plan.items() if key != "set"}


def v3(*sets):
    words = {"gpu": "h800", "model": "v3-671b", "tokens": "14.8T", "gpus": "2048", "sets": sets}
    return without_sets(make_plan(parse_request(**words)))


@pytest.fixture(scope="module")
def usual():
    return v3()


def test_every_factor_is_in_the_docs_as_it_is():
    known = {**factor_table("money"), **factor_table("reliability"), **factor_table("serving"), **CONSTANTS}
    assert set(NAMED) == set(known)
    for table in ("reliability", "serving"):
        for name, factor in factor_table(table).items():
            interval = "" if factor.low is None else "{:g} to {:g}".format(*factor.interval)
            row = f"| `{name}` | {factor.value:g} | {interval} | {factor.unit} | {factor.citation} |"
            assert row in DOC, f"docs/cost-method.md lacks: {row}"
    for name, constant in CONSTANTS.items():
        row = (
            f"| `{name}` | {shipped_calibration()[name]:.3g} | {constant.prior:g} | {math.exp(constant.sigma):.2f} | "
            f"{constant.meaning} | {constant.source} |"
        )
        assert row in DOC, f"docs/cost-method.md lacks: {row}"


@pytest.mark.parametrize(
    "name",
    sorted({*factor_table("reliability"), *factor_table("serving"), *CONSTANTS, "research_multiplier",
            "draw_share", "facility_overhead", "utilisation"} - set(NOT_OF_A_PLAN) - ELSEWHERE),
)  # fmt: skip
def test_each_factor_moves_a_plan(name, usual):
    value = {**shipped_calibration(), **{k: f.value for t in ("money", "reliability", "serving")
                                         for k, f in factor_table(t).items()}}[name]  # fmt: skip
    times = 8 if name in SERVING_WAITS_FOR_MORE else 0.8
    assert v3(f"{name}={times * value:g}") != usual


def test_factors_that_change_nothing_are_refused(tmp_path):
    h800 = find_hardware("h800")
    for name, command in NOT_OF_A_PLAN.items():
        with pytest.raises(UserError, match=f"cost {command}"):
            load_assumptions(h800, [f"{name}=1"])
    (tmp_path / "ledger").mkdir()
    for run in (
        lambda sets: device_rates("h800", sets),
        lambda sets: project_cost(1e6, 1, 1, sets),
        lambda sets: lab_report(tmp_path, sets),
    ):
        with pytest.raises(UserError, match="changes nothing here; what does is"):
            run(["cpu_watts=5"])


def test_what_a_plan_refuses_the_named_command_takes(tmp_path):
    (tmp_path / "ledger").mkdir()
    assert project_cost(1e6, 1, 1, ["people_usd_per_year=1"])["people_usd"]["mid"] == 1
    assert lab_report(tmp_path, ["grid_kg_co2_per_kwh=0.1"])["grid_kg_co2_per_kwh"] == 0.1
    constants = [f"{name}=2" for name, command in NOT_OF_A_PLAN.items() if command == "validate"]
    assert set(split_sets(constants)[1].values()) == {2.0}
