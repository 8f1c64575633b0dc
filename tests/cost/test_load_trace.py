"""Experts placed by the loads that a run recorded."""

import json

import pytest
from typer.testing import CliRunner

from baleen.cli import app
from baleen.config import UserError
from baleen.cost.load_trace import place_on_trace

FIRST, SECOND, THIRD = [8, 4, 2, 2], [8, 4, 3, 1], [4, 4, 4, 4]


@pytest.fixture
def run_of(tmp_path):
    def write(*loads):
        rows = [{"step": 50 * n, "expert_load": [[e / 16 for e in layer] for layer in load]} for n, load in loads]
        rows.insert(1, {"step": 51})
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path

    return write


def test_each_record_is_served_by_the_placement_of_the_one_before(run_of):
    """By hand, two GPUs: in order they hold 12 and 4 by the second record, 8 and 8 by the third.

    The first record puts experts 0 and 3 beside each other, and 1 and 2: 9 and 7 by the second. The third is even
    wherever experts lie.
    """
    run = run_of((1, [FIRST, THIRD]), (2, [SECOND]), (3, [THIRD]))  # the MTP layer was left out after the first
    told = place_on_trace(run, gpus=2)
    assert (told["records"], told["layers"], told["experts"]) == (3, 1, 4)
    assert told["before"] == pytest.approx((12 / 8 + 1) / 2)
    assert told["after"] == pytest.approx((9 / 8 + 1) / 2)
    # two copies more, both of expert 0: expert 1 with a third of it and expert 3, two thirds with expert 2
    more = place_on_trace(run_of((1, [FIRST]), (2, [FIRST])), gpus=2, redundant=2)
    assert more["before"] == pytest.approx(12 / 8) and more["after"] == pytest.approx((4 + 2 + 8 / 3) / 8)
    assert more["set"] == f"routing_imbalance={more['after']:.4f}"


def test_what_cannot_be_placed(run_of, tmp_path):
    with pytest.raises(UserError, match="give the directory of a run"):
        place_on_trace(tmp_path / "nowhere", gpus=2)
    with pytest.raises(UserError, match="recorded the experts' load 1 times"):
        place_on_trace(run_of((1, [FIRST])), gpus=2)
    with pytest.raises(UserError, match="2 nodes do not divide 1 groups"):
        place_on_trace(run_of((1, [FIRST]), (2, [FIRST])), gpus=4, nodes=2)
    with pytest.raises(UserError, match="the nearest number that does is 2"):
        place_on_trace(run_of((1, [FIRST]), (2, [FIRST])), gpus=3)


def test_a_plan_takes_what_is_printed(run_of):
    run = run_of((1, [FIRST]), (2, [SECOND]), (3, [FIRST]))
    told = CliRunner().invoke(app, ["cost", "place", str(run), "--gpus", "2"], catch_exceptions=False)
    command = told.stdout.strip().rpartition(": baleen ")[2]
    assert command.startswith("cost plan ... --set routing_imbalance=1.")
    _, chosen = command.split(" ... ")
    plan = ["cost", "plan", "--model", "dsmoe16b", "--tokens", "100B", "--gpu", "h100", "--gpus", "8", "--json"]

    def seconds(*options):
        done = CliRunner().invoke(app, [*plan, *options], catch_exceptions=False)
        return json.loads(done.stdout)["step_seconds"]

    assert seconds("--set", "routing_imbalance=1") < seconds(*chosen.split())
    assert seconds(*chosen.split()) < seconds("--set", "routing_imbalance=2")
