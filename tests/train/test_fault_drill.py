"""Twenty kills at random moments, saves included, and the run ends as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from baleen.cost.account import read_ledger
from baleen.cost.ledger import BEAT_SECONDS, read_rows
from baleen.train import checkpoint
from baleen.train.rundir import read_metrics

KILLS = 20
BEAT = 0.2  # seconds, instead of the ledger's own, so that a killed piece shows up in it
UNSEEN = 5 * BEAT + 1  # seconds between the last row and the kill: some beats on a busy machine
SCRIPT = f"""
import json, sys, time
from pathlib import Path
from baleen.recipe import load_recipe
from baleen.cost import ledger
ledger.Ledger.stage.__kwdefaults__["beat_seconds"] = {BEAT}
from baleen.train.display import Display
from baleen.train.loop import train
with open(sys.argv[3], "a") as times:
    print(time.time(), file=times)
print(json.dumps(train(load_recipe(sys.argv[1]), Path(sys.argv[2]), resume=True, display=Display(quiet=True))))
"""


def losses(folder):
    return [(r["step"], r["tokens"], r["loss"], r["mtp_loss"], r["grad_norm"]) for r in read_metrics(folder)]


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tiny_recipe, tmp_path):
    recipe = tiny_recipe(
        train={"tokens": 64 * 1200, "checkpoint_every": 3, "ema_decay": 0.9, "optimizer": "muon", "micro_batch_size": 3}
    )
    file = tmp_path / "tiny.toml"
    file.write_text(recipe.to_toml())
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder):
        command = [sys.executable, "-c", SCRIPT, str(file), str(folder), str(folder.with_name("times"))]
        folder.parent.mkdir(exist_ok=True)
        return subprocess.Popen(command, stdout=subprocess.PIPE, env=env)

    def finish(folder):
        process = start(folder)
        out = process.communicate(timeout=900)[0]
        assert process.returncode == 0
        return json.loads(out)

    straight = finish(tmp_path / "straight" / "run")
    folder, rng = tmp_path / "killed" / "run", random.Random(0)
    kill_times, during_saves = [], 0
    for kill in range(KILLS):
        steps = len(read_metrics(folder))
        process = start(folder)
        saves_first = set(checkpoint.saved_steps(folder / "checkpoints"))
        while process.poll() is None and set(checkpoint.saved_steps(folder / "checkpoints")) <= saves_first:
            time.sleep(0.005)  # each piece gets at least one checkpoint further, or the run would never end
        time.sleep(rng.uniform(0, 0.5))
        if kill % 4 == 0:  # every fourth kill waits for a save to be under way
            while process.poll() is None and not list(folder.glob("checkpoints/.aside-*")):
                pass
        assert process.poll() is None, f"the run of {steps} steps ended before its kill"
        kill_times.append(time.time())
        process.send_signal(signal.SIGKILL)
        process.wait()
        during_saves += bool(list(folder.glob("checkpoints/.aside-*")))
    assert during_saves >= 1
    resumed = finish(folder)

    assert resumed["status"] == straight["status"] == "done" and resumed["step"] == 1200
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    assert resumed["heldout_bpb"] == straight["heldout_bpb"]
    assert losses(folder) == losses(tmp_path / "straight" / "run")

    # The ledger: two stages a piece, each known up to its last beat
    account = read_ledger(tmp_path / "killed", now=time.time() + 10 * BEAT_SECONDS)
    assert account.torn == {}
    assert [(stage.stage, stage.status) for stage in account.stages] == [
        *(KILLS * [("data", "done"), ("pretrain", "killed")]),
        *((stage, "done") for stage in ("data", "pretrain", "eval", "export")),
    ]
    pieces = [stage for stage in account.stages if stage.stage == "pretrain"]
    assert [stage.parent for stage in pieces[1:]] == [stage.stage_id for stage in pieces[:-1]]
    rows, _ = read_rows(next((tmp_path / "killed" / "ledger").glob("*.jsonl")))
    for stage in account.stages:
        own = [row for row in rows if row["stage_id"] == stage.stage_id]
        assert own[0]["event"] == "start" and stage.device_seconds == own[-1]["device_seconds"]
        times = [row["monotonic_seconds"] for row in own]
        assert stage.device_seconds == pytest.approx(times[-1] * stage.devices)
    for stage, killed in zip(pieces[:-1], kill_times, strict=True):
        assert killed - UNSEEN < stage.last.timestamp() <= killed + 0.1  # what a kill may hide
    assert sum(stage.tokens for stage in pieces) >= resumed["tokens"] - KILLS * 64 * 200

    # from each call of `train` up to its piece's last row no more is missing than lies between stages
    began = list(map(float, (tmp_path / "killed" / "times").read_text().split()))
    ended = [*(stage.last.timestamp() for stage in pieces[:-1]), account.stages[-1].last.timestamp()]
    accounted = sum(stage.device_seconds / stage.devices for stage in account.stages)
    assert sum(ended) - sum(began) - 0.1 * len(began) <= accounted <= sum(ended) - sum(began)
