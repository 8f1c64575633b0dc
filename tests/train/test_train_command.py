"""`baleen train` as a user types it: what it leaves, on one's own text, and through a kill."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from baleen.cli import app
from baleen.config import UserError
from baleen.cost.ledger import read_rows
from baleen.eval.report import write_report
from baleen.train import checkpoint


def test_the_results_stay_in_the_run_and_reach_its_report(tiny_recipe, tmp_path):
    recipe, run = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(tiny_recipe().to_toml(), encoding="utf-8")
    done = CliRunner().invoke(app, ["train", str(recipe), "--run", str(run), "--max-steps", "1", "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert json.loads((run / "train.json").read_text(encoding="utf-8")) == printed
    assert f"{printed['heldout_bpb']:.3f} of the model at the end" in write_report(run).read_text(encoding="utf-8")


def test_eval_finds_what_training_found(tiny_recipe, tmp_path):
    recipe, run = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(tiny_recipe().to_toml(), encoding="utf-8")
    trained = CliRunner().invoke(app, ["train", str(recipe), "--run", str(run), "--max-steps", "1", "--json"])
    told = CliRunner().invoke(app, ["eval", str(run), "--json"])
    assert told.exit_code == 0, told.output
    measured = json.loads(told.stdout)
    expected = json.loads(trained.stdout)["heldout_bpb"]
    assert measured["heldout"] and measured["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert json.loads((run / "eval.json").read_text(encoding="utf-8")) == measured
    booked = rows_of_eval(run)
    shutil.copytree(run / "model", run / "model-ema")
    own = json.loads(CliRunner().invoke(app, ["eval", str(run / "model-ema"), "--json"]).stdout)
    assert {**own, "run": str(run)} == measured and rows_of_eval(run) > booked > 0
    assert not (run / "model-ema" / "data").exists()  # the run's text is found again, not prepared anew
    assert json.loads((run / "eval.json").read_text(encoding="utf-8"))["run"] == str(run)  # is of the run alone


def rows_of_eval(run):
    (file,) = (run.parent / "ledger").glob("run-*.jsonl")
    return sum(row["stage"] == "eval" for row in read_rows(file)[0] if "stage" in row)


def test_training_on_a_folder_of_ones_own_text(corpus, tmp_path):
    """README's line: refused with the size of the vocabulary that fits, then done with it."""
    command = ["train", "chitchat", "--data", str(corpus), "--run", str(tmp_path / "mine"), "--max-steps", "2"]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, UserError)
    fits = re.search(r"vocab_size is 4096, but the text fills only (\d+): set model.vocab_size", str(refused.exception))
    assert fits is not None
    done = CliRunner().invoke(app, [*command, "--set", f"model.vocab_size={fits[1]}", "--json"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert (summary["status"], summary["step"]) == ("stopped", 2) and 0 < summary["heldout_bpb"] < 16
    assert (tmp_path / "mine" / "model" / "model.safetensors").is_file()


SMALL = {
    "model.vocab_size": 1024, "model.hidden_size": 64, "model.num_hidden_layers": 2, "model.intermediate_size": 128,
    "model.moe_intermediate_size": 32, "model.q_lora_rank": 32, "model.kv_lora_rank": 32, "data.heldout_fraction": 0.02,
    "train.checkpoint_every": 10, "train.sample_every_seconds": 0,
}  # fmt: skip


@pytest.mark.slow
def test_killed_and_resumed_equals_straight(tmp_path):
    """kill -9 of `baleen train chitchat`, at the recipe's own precision and on two threads."""
    settings = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]

    def start(run, *more):
        command = [sys.executable, "-m", "baleen", "train", "chitchat", "--run", str(tmp_path / run), *settings]
        command += ["--max-steps", "40", "--json", *more]
        return subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "2"})

    def finish(process):
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0
        return json.loads(out)

    straight = finish(start("straight"))
    killed, folder = start("killed"), tmp_path / "killed" / "checkpoints"
    while not checkpoint.saved_steps(folder):
        assert killed.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert 10 <= checkpoint.saved_steps(folder)[-1] < 40 and not (tmp_path / "killed" / "model").exists()
    resumed = finish(start("killed", "--resume"))
    assert straight["step"] == resumed["step"] == 40
    for key in ("weights_sha256", "heldout_bpb", "loss"):
        assert resumed[key] == straight[key]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["train", "cpu-s", "--run", "r", "--world", "8"], "--world is for --dry-run"),
     (["chat", "runs/r", "--model", "m"], "--model is for a --url"),
     (["chat", "runs/r", "--api-key", "k"], "--api-key is for a --url")],
)  # fmt: skip
def test_options_that_would_be_ignored(arguments, says):
    with pytest.raises(UserError, match=says):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
