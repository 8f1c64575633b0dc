"""`baleen cost ...` as a user types it: one JSON object on stdout, mistakes named, torch never imported."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from baleen.cli_cost import app
from baleen.config import UserError
from baleen.cost.ledger import Ledger
from baleen.cost.money import rate_card

PLAN = ["plan", "--model", "v3-671b", "--tokens", "1T", "--gpu", "h800", "--gpus", "2048"]


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "demo"
    with Ledger.open(run).stage("pretrain", devices=2, device_name="cpu", rate=rate_card("cpu")):
        pass
    return run


def cost(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result


def test_card_mark_add_report(run_dir):
    card = json.loads(cost("card", run_dir, "--json").stdout)
    assert card["headline_usd"] == card["full_usd"] > 0
    assert json.loads(cost("card", "demo", "--json").stdout) == card  # by its name, in the lab that is here
    assert cost("mark", "demo", "research").stdout == cost("mark", run_dir, "final").stdout == ""
    added = cost("add", "--category", "people", "--usd", 12, "--period", "2026-01..2026-02")
    assert added.stdout == "" and "recorded 12 USD of people" in added.stderr
    report = json.loads(cost("report", "--json", "--html", "page.html").stdout)
    assert report["purposes"]["final"]["count"] == 1
    assert report["full_usd"] == pytest.approx(12 + card["full_usd"])
    assert "not recorded" in cost("card", run_dir).stdout
    assert "default" in cost("report", run_dir.parent).stdout


def test_claims_and_rate():
    claims = json.loads(cost("claims", "--json", "--set", "research_multiplier=2").stdout)
    assert {"id", "claimed", "computed", "relative_error", "leaves_out", "source"} <= set(claims["claims"][0])
    assert claims["effects"][0]["id"] == "with_research"
    assert "| V3 headline | $5.576M | $5.576M | exact |" in cost("claims", "--markdown").stdout
    assert "V3 headline" in cost("claims").stdout
    assert json.loads(cost("rate", "cpu", "--json").stdout)["own"] is None
    assert "owning one" in cost("rate", "b200", "--usd", 40000).stdout


def test_plan_and_its_record(run_dir):
    options = ("plan", "--gpu", "h800", "--model", "v3-671b", "--tokens", "14.8T", "--gpus", 2048)
    plan = json.loads(cost(*options, "--json", "--record", run_dir).stdout)
    assert {"layout", "step_seconds", "chain", "tokens_per_second_per_gpu", "memory_gib_per_rank"} <= set(plan)
    assert set(plan["mfu"]) >= {"value", "convention"} and set(plan["usd"]) == {"low", "mid", "high"}
    rows = json.loads(cost("report", "--json").stdout)["plans"]
    assert {row["figure"]: row["planned"] for row in rows} == {
        "usd": plan["usd"]["mid"],
        "device_hours": plan["gpu_hours"],
    }
    dearer = json.loads(cost(*options, "--json", "--set", "matmul_hopper=2").stdout)
    assert dearer["step_seconds"] > plan["step_seconds"]
    text = cost(*options).stdout
    assert "kernels" in text and "leaves out" in text and "Beside the published step" in text


def test_project():
    out = json.loads(cost("project", "--final", "$5.576M", "--people", 150, "--json").stdout)
    assert out["full_usd"]["mid"] == pytest.approx(5.6 * 5.576e6 + 150 * 3e5)
    assert out["compute_usd"]["low"] < out["full_usd"]["low"] < out["full_usd"]["mid"] < out["full_usd"]["high"]
    assert out["headline_usd"] == 5.576e6 and "people" in out["headline_leaves_out"]
    alone = json.loads(cost("project", "--final", "10", "--set", "research_multiplier=2", "--json").stdout)
    assert alone["full_usd"] == {"low": 20, "mid": 20, "high": 20}
    assert "leaves out" in cost("project", "--final", "1k").stdout


def test_simulate():
    out = json.loads(cost("simulate", "schedules", "--schedule", "zb1p", "--json").stdout)
    assert list(out["schedules"]) == ["zb1p"]
    assert json.loads(cost("simulate", "failures", "--gpus", 64, "--days", 1, "--json").stdout)["gpus"] == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--gpu", "h8000", "--model", "v3-671b", "--tokens", "1T", "--gpus", "8"], "unknown hardware"),
        (["plan", "--gpu", "h800", "--model", "v3-671b", "--tokens", "-1T", "--gpus", "8"], "above 0"),
        (["validate", "nowhere.csv"], "nowhere.csv"),
        (["simulate", "schedules", "--schedule", "tripipe"], "no pipeline schedule"),
        (["claims", "--svg", "nowhere/scopes.svg"], "cannot be written"),
        (["project", "--final", "1M", "--people", "-1"], "absurd"),
        (["project", "--final", "-1M"], "above 0"),
        (["mark", "runs/demo", "best"], "unknown purpose"),
        (["mark", "runs/nobody", "final"], "knows no run"),
        (["card", "runs/nobody"], "knows no run"),
        (["add", "--category", "fun", "--usd", "1", "--period", "2026"], "unknown category"),
        (["add", "--category", "data", "--usd", "-1", "--period", "2026"], "absurd"),
        (["add", "--category", "data", "--usd", "1", "--period", "later"], "period"),
        (["report", "nowhere"], "holds no folder"),
        (["claims", "--set", "nothing=1"], "no factor"),
        (["calibrate", "--out", "nowhere/hardware.toml"], "cannot be written"),
        ([*PLAN, "--set", "context_tokens=0"], "divided by was set to 0"),
        (["simulate", "schedules", "--forward", "0", "--backward", "0", "--weight", "0"], "nothing takes time"),
        (["simulate", "schedules", "--forward", "nan"], "forward time of a stage is nan"),
        (["validate", "."], "cannot be read"),
        ([*PLAN, "--hardware", "."], "cannot be read"),
        (["rate", "cpu", "--usd", "100"], "rents alone"),
    ],
)
def test_mistakes_are_named(run_dir, arguments, message):
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_no_lab_is_a_mistake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no lab is named"):
        CliRunner().invoke(app, ["report"], catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


def test_help_imports_next_to_nothing():
    code = (
        "import sys, baleen.cli_cost; print([m for m in ('torch', 'numpy', 'pydantic', 'plotly') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_no_cost_module_imports_torch():
    code = (
        "import sys, pkgutil, importlib, baleen.cost\n"
        "for m in pkgutil.iter_modules(baleen.cost.__path__): importlib.import_module('baleen.cost.' + m.name)\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
