"""The account adds up what the ledgers say, and the card puts the headline beside the full price."""

import json
import shutil
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baleen.config import UserError
from baleen.cost.account import add, find_run, mark, parse_period, read_ledger
from baleen.cost.card import card_paragraph, card_rows, card_table, cost_card
from baleen.cost.ledger import Ledger
from baleen.cost.money import RateCard

RATE = RateCard(3600.0, "one device", "test", watts_per_device=10.0)  # a dollar a device-second


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run_stage(run_dir, seconds, name="pretrain", project="p", error=None, **kwargs):
    clock = Clock()
    stage = Ledger.open(run_dir, project=project).stage(
        name, devices=2, device_name="none", rate=kwargs.pop("rate", RATE), clock=clock, **kwargs
    )
    try:
        with stage:
            clock.now += seconds
            stage.progress(tokens=int(10 * seconds), productive_seconds=seconds / 2)
            if error:
                raise error
    except ValueError:
        pass


@pytest.fixture
def lab(tmp_path):
    run_stage(tmp_path / "final", 3, "tokenizer")
    run_stage(tmp_path / "final", 100)
    run_stage(tmp_path / "final", 20, "sft")
    run_stage(tmp_path / "final", 5, "eval")
    run_stage(tmp_path / "try", 50, error=ValueError())
    run_stage(tmp_path / "elsewhere", 178, project="q")
    shutil.rmtree(tmp_path / "try")
    return tmp_path


def test_the_card_puts_headline_beside_full(lab):
    card = cost_card(lab / "final")
    assert card["headline_usd"] == pytest.approx(240)
    assert card["full_usd"] == pytest.approx(356)
    assert card["ratio"] == pytest.approx(356 / 240)
    assert card["device_hours"] == pytest.approx(240 / 3600)
    assert card["failed_usd"] == pytest.approx(100)
    assert card["runs"] == 2
    assert (card["joules"], card["energy_how"]) == (pytest.approx(2400), "estimated")
    assert card["productive_share"] == pytest.approx(0.5)
    assert card["tokens"] == 1200
    assert card["rate_card"] == RATE.to_dict()
    assert card["recorded"] == dict.fromkeys(("people", "data", "hardware", "other"), "not recorded")
    assert card["stages"]["tokenizer"] == pytest.approx(6)
    assert card["stages"]["rl"] == "not recorded"
    assert "people: not recorded" in card["full_leaves_out"]
    assert json.loads(json.dumps(card)) == card


def test_a_tokenizer_made_with_the_data_is_not_called_unknown(tmp_path):
    run_stage(tmp_path / "run", 100)
    assert cost_card(tmp_path / "run")["stages"]["tokenizer"] == "not recorded"
    run_stage(tmp_path / "run", 5, "data")
    assert cost_card(tmp_path / "run")["stages"]["tokenizer"] == "in data"
    run_stage(tmp_path / "run", 3, "tokenizer")
    assert cost_card(tmp_path / "run")["stages"]["tokenizer"] == pytest.approx(6)


def test_recorded_costs_join_the_full_price_only(lab):
    add(lab, "people", 1000, "2026-01..2026-03", project="p", note="one student")
    add(lab, "hardware", 90, "2026", project="q")
    add(lab, "data", 712, "2026-02-03")  # of the whole lab: p holds 356 of its 712 compute dollars
    card = cost_card(lab / "final")
    assert card["headline_usd"] == pytest.approx(240)
    assert card["recorded"] == {
        "people": 1000,
        "data": pytest.approx(356),
        "hardware": "not recorded",
        "other": "not recorded",
    }
    assert card["full_usd"] == pytest.approx(356 + 1000 + 356)
    assert read_ledger(lab).recorded() == {"people": 1000, "hardware": 90, "data": 712}


def test_mark_amends_what_stands_before_it(lab):
    mark(lab, lab / "final", "final")
    mark(lab, "try", "failed")
    run_stage(lab / "final", 1, "serve")
    stages = read_ledger(lab).stages
    purposes = {(s.run, s.stage): s.purpose for s in stages}
    assert purposes[("final", "pretrain")] == purposes[("final", "eval")] == "final"
    assert purposes[("final", "serve")] == "research"
    assert purposes[("try", "pretrain")] == "failed"
    assert cost_card(lab / "final")["purposes"]["final"] == pytest.approx(256)


def test_a_run_is_found_by_directory_name_or_id(lab):
    run_id = find_run(lab, lab / "final")
    assert find_run(lab, run_id) == find_run(lab, "final") == run_id
    assert cost_card(lab / "try")["headline_usd"] == pytest.approx(100)
    run_stage(lab / "try", 1)
    assert find_run(lab, lab / "try") != cost_card(lab / "final")["run_id"]
    with pytest.raises(UserError, match="2 runs were called 'try'"):
        find_run(lab, "try")
    with pytest.raises(UserError, match="knows no run 'nobody'"):
        mark(lab, "nobody", "final")
    with pytest.raises(UserError, match="unknown purpose"):
        mark(lab, "final", "best")


def test_a_stage_without_end_is_running_then_killed(lab):
    path = Ledger.open(lab / "final").path
    rows = path.read_text().splitlines()
    assert json.loads(rows[-1])["event"] == "end"
    path.write_text("\n".join(rows[:-1]) + "\n")
    began = read_ledger(lab).of_run(path.stem)[-1].last.timestamp()
    assert read_ledger(lab, now=began + 5).of_run(path.stem)[-1].status == "running"
    assert read_ledger(lab, now=began + 3600).of_run(path.stem)[-1].status == "killed"


def test_lines_that_cannot_be_read_are_counted_and_skipped(lab):
    path = Ledger.open(lab / "final").path
    rows = path.read_text().splitlines()
    broken = [
        "{torn",
        "[1, 2]",
        json.dumps({**json.loads(rows[-1]), "device_seconds": -5}),
        json.dumps({**json.loads(rows[-1]), "stage": "party"}),
        json.dumps({**json.loads(rows[-1]), "time": "2026-11-01T12:00:00"}),  # of no time zone
        json.dumps({**json.loads(rows[-1]), "rate": {"usd_per_device_hour": 1}}),
        json.dumps({"event": "amend", "purpose": "best"}),
        '{"device_seconds": NaN}',
    ]
    path.write_text("\n".join(rows + broken) + "\n" + rows[-1][:40])
    (lab / "ledger" / "costs.jsonl").write_text('{"category": "fun", "usd": 1}\n')
    account = read_ledger(lab)
    assert account.torn == {path.name: 9, "costs.jsonl": 1}
    card = cost_card(lab / "final")
    assert card["full_usd"] == pytest.approx(356)
    assert card["torn_lines"] == 10


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_no_bytes_in_a_ledger_stop_the_account(tmp_path_factory, junk):
    lab = tmp_path_factory.mktemp("lab")
    run_stage(lab / "a", 1)
    path = Ledger.open(lab / "a").path
    path.write_bytes(path.read_bytes() + b"\n" + b"\n".join(junk))
    assert sum(s.usd for s in read_ledger(lab).stages) == pytest.approx(2)


@pytest.mark.parametrize(
    ("text", "begin", "end"),
    [
        ("2026-01-05..2026-02-03", date(2026, 1, 5), date(2026, 2, 3)),
        ("2024-02..2024-02", date(2024, 2, 1), date(2024, 2, 29)),
        ("2025", date(2025, 1, 1), date(2025, 12, 31)),
        ("2025 .. 2026-01", date(2025, 1, 1), date(2026, 1, 31)),
    ],
)
def test_periods(text, begin, end):
    assert parse_period(text) == (begin, end)


@pytest.mark.parametrize(
    "text", ["", "..", "yesterday", "2026-13", "2026-02-30", "2026..2025", "1066", "2026-1..2026-2"]
)
def test_bad_periods_are_mistakes(text):
    with pytest.raises(UserError, match="period"):
        parse_period(text)


def test_bad_costs_write_nothing(lab):
    for category, amount, project in [
        ("fun", 1, None),
        ("people", -1, None),
        ("people", float("nan"), None),
        ("data", 1, " "),
    ]:
        with pytest.raises(UserError):
            add(lab, category, amount, "2026", project)
    with pytest.raises(UserError):
        add(lab, "people", 1, "soon")
    assert not (lab / "ledger" / "costs.jsonl").exists()


def test_a_lab_without_ledger_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="holds no folder 'ledger'"):
        read_ledger(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_paragraph_says_both_prices_and_what_is_missing(lab):
    add(lab, "people", 1000, "2026", project="p")
    text = card_paragraph(cost_card(lab / "final"))
    assert "$240.00" in text and "$1,356" in text and "5.7 times" in text
    assert "data, hardware, other" in text and "people" not in text
    assert card_table(cost_card(lab / "final")).row_count == len(card_rows(cost_card(lab / "final"))) == 9


def test_a_run_without_training_has_no_headline(tmp_path):
    run_stage(tmp_path / "a", 5, "eval", rate=RateCard(1.0, "one", "test"))
    card = cost_card(tmp_path / "a")
    assert (card["headline_usd"], card["ratio"], card["joules"], card["energy_how"]) == (0, None, None, "unknown")
    assert "Energy of the final run: unknown" in card_paragraph(card)
