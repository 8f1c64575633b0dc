"""The lab's report adds up, compares plans with what happened, and makes a page that asks for nothing outside."""

import io
import json
import re

import pytest
from rich.console import Console

from baleen.config import UserError
from baleen.cost.account import add, amend, mark, read_ledger
from baleen.cost.ledger import Ledger
from baleen.cost.money import RateCard
from baleen.cost.page import write_page
from baleen.cost.report import lab_report, report_sentences, report_tables, spent_rows

RATE = RateCard(3600.0, "one device", "test", watts_per_device=36000.0)  # a dollar and 10 Wh a device-second


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run_stage(run_dir, seconds, name="pretrain", project="p", **kwargs):
    clock = Clock()
    ledger = Ledger.open(run_dir, project=project)
    with ledger.stage(name, devices=1, device_name="none", rate=RATE, clock=clock, **kwargs) as stage:
        clock.now += seconds
        stage.progress(tokens=1, productive_seconds=seconds * 0.8)


@pytest.fixture
def lab(tmp_path):
    run_stage(tmp_path / "first", 100)
    run_stage(tmp_path / "best", 200, plan={"usd": 160.0, "device_hours": 0.05})
    run_stage(tmp_path / "best", 30, "eval")
    run_stage(tmp_path / "other", 50, project="[b]<q>")
    run_stage(tmp_path / "ablation", 20, project="[b]<q>", purpose="ablation")
    add(tmp_path, "people", 400, "2026", project="p")
    return tmp_path


def test_the_report_adds_up(lab):
    report = lab_report(lab)
    assert report["full_usd"] == pytest.approx(800)
    assert report["headline_usd"] == pytest.approx(200 + 50)
    assert report["ratio"] == pytest.approx(800 / 250)
    assert report["recorded"]["people"] == 400 and report["recorded"]["data"] == "not recorded"
    assert {name: entry["usd"] for name, entry in report["stages"].items()} == pytest.approx(
        {"pretrain": 370, "eval": 30}
    )
    assert {name: entry["usd"] for name, entry in report["purposes"].items()} == pytest.approx(
        {"research": 380, "ablation": 20}
    )
    by_name = {p["project"]: p for p in report["projects"]}
    assert by_name["p"]["full_usd"] == pytest.approx(730) and by_name["[b]<q>"]["full_usd"] == pytest.approx(70)
    assert sum(p["full_usd"] for p in report["projects"]) == pytest.approx(report["full_usd"])
    assert report["productive_share"] == pytest.approx(0.8)
    assert json.loads(json.dumps(report, allow_nan=False))["torn_lines"] == {}


def test_runs_marked_final_are_the_headline(lab):
    mark(lab, "first", "final")
    assert lab_report(lab)["headline_usd"] == pytest.approx(100 + 50)


def test_energy_becomes_co2_by_stated_factors(lab):
    report = lab_report(lab, ["facility_overhead=2", "grid_kg_co2_per_kwh=0.5"])
    assert report["joules"] == pytest.approx(400 * 36000)
    assert report["facility_kwh"] == pytest.approx(2 * 4)
    assert report["co2_kg"] == report["co2_kg_low"] == report["co2_kg_high"] == pytest.approx(4)
    plain = lab_report(lab)
    assert plain["co2_kg_low"] < plain["co2_kg"] < plain["co2_kg_high"]
    assert "IEA" in plain["grid_source"]


def test_a_plan_meets_what_was_measured(lab):
    rows = {row["figure"]: row for row in lab_report(lab)["plans"]}
    assert set(rows) == {"usd", "device_hours"}
    assert rows["usd"]["relative_error"] == pytest.approx(0.25)
    assert rows["device_hours"]["relative_error"] == pytest.approx(200 / 3600 / 0.05 - 1)
    amend(lab, "best", {"plan": {"usd": 200.0}})
    assert [row["relative_error"] for row in lab_report(lab)["plans"]] == [pytest.approx(0, abs=1e-6)]


def test_torn_lines_are_told(lab):
    path = Ledger.open(lab / "best").path
    path.write_text(path.read_text() + "{")
    assert lab_report(lab)["torn_lines"] == {path.name: 1}
    assert any("Skipped 1 unreadable" in line for line in report_sentences(lab_report(lab)))


def test_bought_machines_are_warned_of(lab):
    assert not any("counts them twice" in line for line in report_sentences(lab_report(lab)))
    add(lab, "hardware", 10, "2026")
    assert any("counts them twice" in line for line in report_sentences(lab_report(lab)))


def test_each_recorded_cost_is_shown_with_its_period(lab, tmp_path):
    add(lab, "people", 90, "2026-02..2026-03", project="[b]<q>", note="[i]one student")
    add(lab, "data", 5, "2025-12-31")
    rows = spent_rows(lab_report(lab))
    first = rows.index(("recorded", "people", "$490.00", "", ""))
    assert rows[first + 1 : first + 3] == [
        ("", "2026-01-01..2026-12-31, p", "$400.00", "", ""),
        ("", "2026-02-01..2026-03-31, [b]<q>: [i]one student", "$90.00", "", ""),
    ]
    assert rows[rows.index(("recorded", "data", "$5.00", "", "")) + 1] == (
        "", "2025-12-31..2025-12-31, the whole lab", "$5.00", "", "",
    )  # fmt: skip
    assert sum(row[0] == "" for row in rows) == 3  # each below its own category alone
    assert sum(cost["usd"] for cost in json.loads(json.dumps(lab_report(lab)["costs"]))) == 495
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report_tables(lab_report(lab)))
    assert "[b]<q>: [i]one student" in console.export_text()


def test_the_tables_name_projects_and_plans(lab):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report_tables(lab_report(lab)))
    text = console.export_text()
    assert "[b]<q>" in text and "Plan against measured" in text and "+25 %" in text and "3.2 times" in text


def test_the_page_is_self_contained_and_escaped(lab, tmp_path):
    write_page(lab_report(lab), read_ledger(lab), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    own = re.sub(r"<script>/\*.*?</script>", "", page, flags=re.S)
    assert not re.search(r"(src|href)=|@import|url\(", own)
    assert "default-src 'none'" in page
    assert "&lt;q&gt;" in own and "<q>" not in own
    assert "$800.00" in own
    assert "<td>purpose</td><td>ablation</td><td>$20.00</td>" in own and "<td>people</td><td>$400.00</td>" in own
    assert [p.name for p in tmp_path.glob(".page*")] == []


def test_a_page_that_cannot_be_written_is_a_mistake(lab, tmp_path):
    with pytest.raises(UserError, match="--html"):
        write_page(lab_report(lab), read_ledger(lab), tmp_path / "nowhere" / "page.html")


def test_an_empty_lab_has_no_ratio(tmp_path):
    (tmp_path / "ledger").mkdir()
    report = lab_report(tmp_path)
    assert (report["headline_usd"], report["ratio"], report["projects"], report["joules"]) == (0, None, [], None)
    assert report_sentences(report)
