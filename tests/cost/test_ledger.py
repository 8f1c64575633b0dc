"""The ledger keeps every second through exceptions, kills, torn lines and deletions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from baleen.config import UserError
from baleen.cost.ledger import Ledger, append_row, read_rows
from baleen.cost.money import RateCard

RATE = RateCard(3600.0, "one device", "test", watts_per_device=10.0)


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def rows_of(run_dir: Path) -> list[dict]:
    return read_rows(Ledger.open(run_dir).path)[0]


def stage(run_dir: Path, name="pretrain", clock=time.monotonic, **kwargs):
    kwargs = {"devices": 2, "device_name": "none", "rate": RATE, **kwargs}
    return Ledger.open(run_dir, project="p").stage(name, clock=clock, **kwargs)


def test_a_stage_accounts_for_its_time(tmp_path):
    clock = Clock()
    with stage(tmp_path / "a", clock=clock, purpose="final") as running:
        clock.now += 5
        running.progress(tokens=70, productive_seconds=4.0)
        assert running.device_seconds == 10
        assert running.usd == 10
        assert running.joules == 100
        running.beat()
        clock.now += 1
    start, beat, end = rows_of(tmp_path / "a")
    assert [row["event"] for row in (start, beat, end)] == ["start", "beat", "end"]
    assert (beat["device_seconds"], beat["productive_device_seconds"], beat["tokens"]) == (10, 8, 70)
    assert (end["device_seconds"], end["joules"], end["energy_how"], end["status"]) == (12, 120, "estimated", "done")
    assert end["rate"] == RATE.to_dict()
    assert (end["run"], end["project"], end["stage"], end["purpose"], end["parent"]) == (
        "a",
        "p",
        "pretrain",
        "final",
        None,
    )
    assert len({row["row_id"] for row in (start, beat, end)}) == 3


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "failed"), (KeyboardInterrupt, "interrupted"), (SystemExit, "interrupted")]
)
def test_an_exception_ends_the_stage_and_goes_on(tmp_path, error, status):
    with pytest.raises(error), stage(tmp_path / "a"):
        raise error
    assert rows_of(tmp_path / "a")[-1]["status"] == status


def test_a_loop_may_say_that_it_was_interrupted(tmp_path):
    with stage(tmp_path / "a") as running:
        running.interrupted()
    assert rows_of(tmp_path / "a")[-1]["status"] == "interrupted"


def test_a_resumed_stage_names_the_one_before(tmp_path):
    with stage(tmp_path / "a") as first:
        pass
    with stage(tmp_path / "a", name="eval") as other:
        pass
    with stage(tmp_path / "a") as second:
        pass
    assert (first.parent, other.parent, second.parent) == (None, None, first.stage_id)


def test_the_ledger_outlives_its_run_directory(tmp_path):
    with stage(tmp_path / "a"):
        pass
    first = Ledger.open(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    second = Ledger.open(tmp_path / "a")
    assert first.run_id != second.run_id
    assert first.path.exists()
    assert first.path.parent == tmp_path / "ledger"
    assert Ledger.open(tmp_path / "a").run_id == second.run_id


def test_the_lab_may_be_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BALEEN_LAB", str(tmp_path / "lab"))
    assert Ledger.open(tmp_path / "a").path.parent == tmp_path / "lab" / "ledger"


def test_other_ranks_write_nothing(tmp_path):
    with Ledger.open(tmp_path / "a", rank=1).stage("rl", devices=2, device_name="none", rate=RATE) as running:
        assert running.usd >= 0
    assert list(tmp_path.iterdir()) == []


def test_a_torn_line_is_closed_off_and_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    append_row(path, {"a": 1})
    path.write_bytes(path.read_bytes() + b'{"a": 2, "b')
    append_row(path, {"a": 3})
    assert read_rows(path) == ([{"a": 1}, {"a": 3}], 1)


def test_rows_of_many_writers_stay_whole(tmp_path):
    code = (
        "import sys; from pathlib import Path; from baleen.cost.ledger import append_row\n"
        "for i in range(50): append_row(Path(sys.argv[1]), {'i': i, 'pad': 'x' * 3000})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x.jsonl")]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    rows, torn = read_rows(tmp_path / "x.jsonl")
    assert (len(rows), torn) == (150, 0)


CHILD = """
import sys, time
from pathlib import Path
from baleen.cost.ledger import Ledger
from baleen.cost.money import RateCard
ledger = Ledger.open(Path(sys.argv[1]))
with ledger.stage("pretrain", devices=1, device_name="none", rate=RateCard(1.0, "", ""), beat_seconds=0.05):
    print("started", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, "running"), (signal.SIGTERM, "interrupted")])
def test_a_signal_loses_at_most_a_beat(tmp_path, number, status):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "started\n"
    path = Ledger.open(tmp_path / "a").path
    while len(read_rows(path)[0]) < 4:
        assert child.poll() is None
        time.sleep(0.02)
    os.kill(child.pid, number)
    child.wait()
    rows, torn = read_rows(path)
    assert (torn, rows[-1]["status"]) == (0, status)
    assert rows[-1]["device_seconds"] >= 0.1
    assert [row["event"] for row in rows[:4]] == ["start", "beat", "beat", "beat"]


def test_a_full_disk_in_mid_run_is_a_warning(tmp_path, capsys):
    clock = Clock()
    with stage(tmp_path / "a", clock=clock) as running:
        path = running.ledger.path
        aside = path.rename(tmp_path / "aside")
        path.mkdir()
        clock.now += 1
        running.beat()
        path.rmdir()
        aside.rename(path)
    assert "the ledger could not be written" in capsys.readouterr().err
    assert rows_of(tmp_path / "a")[-1]["device_seconds"] == 2


class BrokenMeter:
    how, note = "measured", "a counter that fails after its first reading"

    def __init__(self):
        self.left = 1

    def joules(self, device_seconds):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("driver gone")
        return 5.0


def test_a_failing_meter_costs_no_row(tmp_path, capsys):
    clock = Clock()
    with stage(tmp_path / "a", clock=clock, meter=BrokenMeter()):
        clock.now += 1
    start, end = rows_of(tmp_path / "a")
    assert (start["energy_how"], start["joules"]) == ("measured", 5)
    assert (end["energy_how"], end["joules"], end["device_seconds"]) == ("estimated", 5 + 20, 2)
    assert "driver gone" in capsys.readouterr().err


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="unknown stage 'train'"):
        stage(tmp_path / "a", name="train")
    with pytest.raises(UserError, match="unknown purpose 'fun'"):
        stage(tmp_path / "a", purpose="fun")
    with pytest.raises(UserError, match="absurd"):
        stage(tmp_path / "a", devices=0)
    with pytest.raises(UserError, match="absurd"):
        RateCard(-1.0, "", "")
    with pytest.raises(UserError, match="absurd"):
        RateCard(float("nan"), "", "")
    with pytest.raises(UserError, match="another name"):
        Ledger.open(tmp_path / "ledger")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run_id").write_text("../../etc/passwd")
    with pytest.raises(UserError, match="damaged"):
        Ledger.open(tmp_path / "b")


def test_an_unwritable_ledger_stops_the_stage_before_it_costs(tmp_path):
    (tmp_path / "file").write_text("")
    ledger = Ledger.open(tmp_path / "a", lab=tmp_path / "file")
    with pytest.raises(UserError, match="BALEEN_LAB"), ledger.stage("data", devices=1, device_name="none", rate=RATE):
        pass


def test_a_plan_is_carried_along(tmp_path):
    with stage(tmp_path / "a", plan={"usd": 3.0}):
        pass
    assert [json.dumps(row["plan"]) for row in rows_of(tmp_path / "a")] == ['{"usd": 3.0}'] * 2


def test_the_parts_of_a_stage_stand_in_its_rows(tmp_path):
    with Ledger.open(tmp_path / "r").stage("rl", devices=2, device_name="cpu", rate=RATE) as running:
        running.progress(tokens=70, productive_seconds=4.0, parts={"rollout": 3.0, "update": 1.0})
    rows, _ = read_rows(running.ledger.path)
    assert rows[-1]["productive_device_seconds_by_part"] == {"rollout": 6.0, "update": 2.0}
    assert "productive_device_seconds_by_part" not in rows[0]  # nothing was done yet


def test_a_resumed_stage_knows_what_the_run_cost_before(tmp_path):
    for expected in (0.0, 1.0, 2.0):
        clock = iter([0.0] + [3600.0] * 20).__next__
        ledger = Ledger.open(tmp_path / "r")
        rate = replace(RATE, usd_per_device_hour=0.5)
        with ledger.stage("pretrain", devices=2, device_name="cpu", rate=rate, clock=clock) as running:
            assert running.usd_before == pytest.approx(expected)
            assert running.usd_of_run == pytest.approx(expected + 1.0)
