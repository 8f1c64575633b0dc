"""`torchrun -m baleen -- train` as a user starts it: the run directory, faults, kills, hangs."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import baleen
from baleen.cost.account import read_ledger
from baleen.interop.huggingface import load_model
from baleen.parallel.state import shard_file
from baleen.train import checkpoint
from baleen.train.rundir import read_metrics

pytestmark = pytest.mark.slow
STEPS = 12  # of recipe_file, unless told otherwise


def rows(run):
    return [(r["step"], r["tokens"], r["loss"], r["grad_norm"]) for r in read_metrics(run)]


def train(torchrun, processes, recipe, run, *more, **keys):
    return torchrun(processes, "-m", "baleen", "--", "train", recipe, "--run", run, *more, "--json", **keys)


def test_a_run_of_two_processes_is_a_run(torchrun, recipe_file, tmp_path):
    run = tmp_path / "lab" / "run"
    done = train(torchrun, 2, recipe_file(parallel={"expert": 2}), run)
    summary = json.loads(done.stdout)  # one object: the other process says nothing
    assert summary["status"] == "done" and summary["step"] == STEPS
    assert [row[0] for row in rows(run)] == list(range(1, STEPS + 1))
    account = read_ledger(tmp_path / "lab")
    assert {s.stage: s.devices for s in account.stages} == dict.fromkeys(["data", "pretrain", "eval", "export"], 2)
    model = load_model(run / "model")
    assert len(list((run / "model").glob("model-*-of-00002.safetensors"))) == 2 and model.config.vocab_size == 300
    assert checkpoint.saved_steps(run / "checkpoints") == [STEPS - 2, STEPS]
    assert not list((run / "checkpoints").rglob("*.metadata"))  # torch's own index, a pickle

    # a pipeline continues it, from the newest checkpoint that is whole
    (run / "checkpoints" / f"step-{STEPS}" / "shards" / shard_file(1)).unlink()
    longer = recipe_file("longer", train={"tokens": 256 * STEPS}, parallel={"pipeline": 2, "schedule": "zbv"})
    done = train(torchrun, 2, longer, run, "--resume")
    again = json.loads(done.stdout)
    assert again["status"] == "done" and again["step"] == STEPS
    assert done.stderr.count(f"step-{STEPS} is passed over") == 1 and "shard-00002" in done.stderr


def test_two_processes_export_what_one_has_finished(torchrun, recipe_file, tmp_path):
    """Its checkpoint is no shards: they are written first."""
    run, keys = tmp_path / "run", {"micro_batch_size": 2}
    train(torchrun, 1, recipe_file(train=keys), run)
    one = {name: load_model(run / name).state_dict() for name in ("model", "model-ema")}
    for name in one:
        shutil.rmtree(run / name)  # as if it had been killed before
    two = recipe_file("two", train=keys, parallel={"expert": 2})  # experts come from two shards
    assert json.loads(train(torchrun, 2, two, run, "--resume").stdout)["status"] == "done"
    for name, expected in one.items():
        found = load_model(run / name).state_dict()
        assert found.keys() == expected.keys(), name
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name


def test_tokens_travel_in_fp8_too_and_the_nodes_that_they_reach_are_told(torchrun, recipe_file, tmp_path):
    told = {}
    for dispatch in ("wide", "fp8"):
        recipe, run = recipe_file(dispatch, parallel={"expert": 2, "dispatch": dispatch}), tmp_path / dispatch
        # a node for each process, as two torchruns would have it; the second time one node for both
        alone = "export LOCAL_WORLD_SIZE=1; " if dispatch == "wide" else ""
        script = f"{alone}exec {sys.executable} -m baleen train $1 --run $2 --max-steps 3"
        torchrun(2, "bash", "-c", script, "bash", recipe, run, options=["--no-python"])
        told[dispatch] = read_metrics(run)
    # of 4 experts, two a node, a token takes 2: they lie on two nodes for two in three of all pairs
    assert all(1.3 < row["nodes_reached"] <= 2 for row in told["wide"])
    assert [row["nodes_reached"] for row in told["fp8"]] == [1, 1, 1]
    for fp8, wide in zip(told["fp8"], told["wide"], strict=True):
        for word, tolerance in (("loss", 0.01), ("mtp_loss", 0.01), ("grad_norm", 0.1)):
            assert fp8[word] != wide[word] and fp8[word] == pytest.approx(wide[word], rel=tolerance), word


@pytest.mark.parametrize(
    ("processes", "train_keys", "parallel", "says"),
    [
        (2, {}, {"expert": 4}, "do not divide by parallel.expert = 4: the nearest that does is parallel.expert = 2"),
        (2, {}, {"world": 4}, "made for 4 processes and 2 were started"),
        (2, {"batch_tokens": 16 * 3}, {}, "take 64"),
        (2, {}, {"pipeline": 2, "zero": 3}, "take parallel.zero=1"),
    ],
)
def test_an_impossible_layout_is_one_sentence(torchrun, recipe_file, tmp_path, processes, train_keys, parallel, says):
    recipe = recipe_file(train=train_keys, parallel=parallel)
    done = train(torchrun, processes, recipe, tmp_path / "run", check=False)
    assert done.returncode and [says in line for line in errors_of(done)] == [True]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("of_rank_1", "says"),
    [
        ("recipe=$2", "rank 1 has another recipe than rank 0"),
        ("export PYTHONPATH=$3", "rank 1 has another version of the code than rank 0"),
    ],
)
def test_ranks_that_were_started_differently_are_told_apart(torchrun, recipe_file, tmp_path, of_rank_1, says):
    recipe, other = recipe_file(), recipe_file("other", train={"lr": 1e-3}, parallel={"expert": 4})
    shutil.copytree(Path(baleen.__file__).parent, tmp_path / "code" / "baleen")
    with (tmp_path / "code" / "baleen" / "cli.py").open("a") as stream:
        stream.write("# another version\n")
    script = f"recipe=$1; [ $RANK = 0 ] || {of_rank_1}; exec {sys.executable} -m baleen train $recipe --run $4"
    command = ["bash", "-c", script, "bash", recipe, other, tmp_path / "code", tmp_path / "run"]
    done = torchrun(2, *command, options=["--no-python"], check=False)
    assert done.returncode and [says in line for line in errors_of(done)] == [True]
    assert not (tmp_path / "run").exists()


def test_ranks_that_read_another_text_are_told_apart(torchrun, recipe_file, tmp_path):
    """The same relative name on two machines: each would train on its own text, and a sum of both gradients."""
    recipe = recipe_file()
    for rank in ("0", "1"):
        shutil.copytree(tmp_path / "corpus", tmp_path / rank / "corpus")
    with next((tmp_path / "1/corpus").iterdir()).open("a") as file:
        file.write("and a whale more")
    script = f"cd $3/$RANK; exec {sys.executable} -m baleen train $1 --run $2 --set 'data.sources=[\"corpus\"]'"
    command = ["bash", "-c", script, "bash", recipe, tmp_path / "run", tmp_path]
    done = torchrun(2, *command, options=["--no-python"], check=False)
    (error,) = errors_of(done)
    assert done.returncode and "rank 1 has another text to train on than rank 0" in error


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_on_one_rank_ends_the_run_and_the_last_good_checkpoint_stays(torchrun, recipe_file, tmp_path, full):
    recipe, run = recipe_file(train={"micro_batch_size": 8}, parallel={"expert": 2}), tmp_path / "run"
    train(torchrun, 2, recipe, run, "--max-steps", "4")
    # its files may not grow over 16 KiB, and a checkpoint does
    script = f"[ $RANK != {full} ] || ulimit -f 16; exec {sys.executable} -m baleen train $1 --run $2 --resume"
    done = torchrun(2, "bash", "-c", script, "bash", recipe, run, options=["--no-python"], check=False)
    assert done.returncode
    (error,) = errors_of(done)
    assert f"step-6 could not be saved (rank {full}: [Errno 27] File too large); the one before it stays" in error
    assert checkpoint.saved_steps(run / "checkpoints")[-1] == 4 and not list((run / "checkpoints").glob(".aside*"))
    assert json.loads(train(torchrun, 2, recipe, run, "--resume").stdout)["step"] == STEPS


def errors_of(done):
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


STORE_IN_RANK_0 = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as the launch templates have it


@pytest.mark.parametrize("environment", [{}, STORE_IN_RANK_0])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("memory", "RuntimeError: DefaultCPUAllocator: can't allocate memory"),
        ("user", "baleen.config.UserError: there is no such thing"),
        ("disk", "OSError: [Errno 28] No space left on device"),
    ],
)
def test_of_one_fault_one_rank_speaks(torchrun, fault, says, environment):
    done = torchrun(3, Path(__file__).with_name("drive_faults.py"), fault, check=False, **environment)
    assert done.returncode
    told = [line for line in done.stderr.splitlines() if re.match(r"\[rank\d\]: [a-zA-Z.]*Error: ", line)]
    assert [says in line for line in told] == [True], done.stderr
    assert "no longer answers" not in done.stderr


@pytest.mark.parametrize("parallel", [{"expert": 2}, {"pipeline": 2, "schedule": "zbv"}])
def test_gates_of_mtp_layers_that_are_left_out_have_no_load(torchrun, recipe_file, tmp_path, parallel):
    recipe = recipe_file(train={"mtp_loss_weight": 0.0}, parallel=parallel)
    train(torchrun, 2, recipe, tmp_path / "run", "--max-steps", "3")
    for row in read_metrics(tmp_path / "run"):
        assert row["mtp_loss"] == 0 and row["max_violation"] is not None and row["loss"] > 0


def test_ten_kills_leave_no_trace(torchrun, recipe_file, tmp_path):
    """torchrun --max-restarts starts all ranks again whenever one is killed."""
    recipe = recipe_file(train={"tokens": 256 * 60, "micro_batch_size": 8}, parallel={"expert": 2})
    straight = tmp_path / "straight" / "run"
    expected = json.loads(train(torchrun, 2, recipe, straight).stdout)
    run, rng = tmp_path / "killed" / "run", random.Random(0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "10", "-m", "baleen", "--", "train", str(recipe), "--run", str(run)]
    command += ["--resume", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    for _ in range(10):
        saved = checkpoint.saved_steps(run / "checkpoints")
        while process.poll() is None and checkpoint.saved_steps(run / "checkpoints") <= saved:
            time.sleep(0.02)  # each piece gets at least one checkpoint further, or the run would never end
        time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None, "the run ended before its kill"
        os.kill(rng.choice(workers_of(process.pid)), signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    assert json.loads(out.splitlines()[-1])["weights_sha256"] == expected["weights_sha256"]
    assert rows(run) == rows(straight)
    pieces = [s for s in read_ledger(tmp_path / "killed", now=time.time() + 1e4).stages if s.stage == "pretrain"]
    assert len(pieces) == 11 and pieces[-1].status == "done"


@pytest.mark.parametrize(
    ("processes", "parallel", "number", "environment"),
    [(2, {}, 1, {}), (4, {"expert": 2}, 1, {}), (2, {}, 0, STORE_IN_RANK_0)],
)
def test_a_hanging_rank_is_named(recipe_file, tmp_path, processes, parallel, number, environment):
    """It alone, by one rank, whichever group the others wait for it in, and if it has the store they talk by."""
    keys = {"tokens": 256 * 1000, "micro_batch_size": 4}
    recipe, run = recipe_file(train=keys, parallel={**parallel, "timeout_seconds": 8}), tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    process = subprocess.Popen(
        [*command, "-m", "baleen", "--", "train", str(recipe), "--run", str(run)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2", **environment},
    )  # fmt: skip
    while process.poll() is None and len(read_metrics(run)) < 3:
        time.sleep(0.05)
    hanging = workers_of(process.pid, processes)[number]
    os.kill(hanging, signal.SIGSTOP)
    err = process.communicate(timeout=240)[1]
    assert process.returncode
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    named = rf"error: rank {number} \([^;]*process {hanging}\) no longer answers: it .*"
    assert re.fullmatch(named, error), err[-3000:]
    assert "RuntimeError" not in err and "RankLost" not in err, err[-3000:]


def workers_of(agent, processes=2):
    """Process ids of the ranks, in order."""
    while True:
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent)], capture_output=True, text=True).stdout
        found = sorted(int(pid) for pid in children.split())
        if len(found) == processes:
            return found
        time.sleep(0.02)
