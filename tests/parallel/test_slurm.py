"""Preemption by a real Slurm: one node on loopback, of Debian's packages, with a low and a high partition."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from baleen.cost.account import read_ledger
from baleen.train.rundir import read_metrics

pytestmark = pytest.mark.slow
LAUNCH = Path(__file__).parents[2] / "launch" / "slurm.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes={host} PriorityTier=1 GraceTime=60 Default=YES State=UP
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=off State=UP
"""


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def until(done, what, seconds=240):
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return found


class Slurm:
    """A cluster of one node with two CPUs."""

    def __init__(self, folder):
        # jobs inherit it, and with it the environment that these tests run in
        self.path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        missing = [name for name in PROGRAMS if shutil.which(name, path=self.path) is None]
        assert not missing, f"no {', '.join(missing)}: `make slurm` installs Debian's packages"
        for name in ("munge", "state", "spool"):
            (folder / name).mkdir(mode=0o700)
        munge, self.conf = folder / "munge", folder / "slurm.conf"
        (munge / "key").write_bytes(secrets.token_bytes(128))
        (munge / "key").chmod(0o400)
        host, ports = socket.gethostname().split(".")[0], (free_port(), free_port())
        self.conf.write_text(CONF.format(host=host, folder=folder, user=getpass.getuser(), ports=ports))
        files = [f"--{word}-file={munge / word}" for word in ("key", "pid", "log", "seed")]
        commands = (
            ["munged", "--force", "--foreground", f"--socket={munge / 'socket'}", *files],
            ["slurmctld", "-D", "-c", "-f", str(self.conf), "-L", str(folder / "slurmctld.log")],
            ["slurmd", "-D", "-f", str(self.conf), "-L", str(folder / "slurmd.log")],
        )
        self.daemons = []
        for command in commands:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self.daemons.append(subprocess.Popen(command, env={**os.environ, "PATH": self.path}, **quiet))
            if command[0] == "munged":
                until((munge / "socket").exists, "munge")
        until(lambda: "idle" in self("sinfo", "--noheader", "--format=%T", check=False), "the node")

    def __call__(self, *command, check=True, **environment):
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": self.path, "SLURM_CONF": str(self.conf), **environment},
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def job(self, number):
        """What Slurm knows of it: {"JobState": ..., "Restarts": ...}."""
        words = self("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self):
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(30)


@pytest.fixture
def slurm(tmp_path):
    folder = tmp_path / "slurm"
    folder.mkdir()
    cluster = Slurm(folder)
    yield cluster
    cluster.stop()


def test_a_preempted_job_saves_is_requeued_and_ends_as_if_undisturbed(slurm, torchrun, recipe_file, tmp_path):
    # only the preemption saves: what the second piece continues is what was saved within the grace time
    recipe = recipe_file(
        train={"micro_batch_size": 8, "tokens": 256 * 200, "checkpoint_every": 0}, parallel={"expert": 2}
    )
    straight, run = tmp_path / "straight" / "run", tmp_path / "preempted" / "run"
    torchrun(2, "-m", "baleen", "--", "train", recipe, "--run", straight)

    out = tmp_path / "job.out"
    of_one_node = ["--nodes=1", "--gpus-per-node=0", f"--output={out}", "--parsable"]
    environment = {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    further = ["--set", "cost.purpose=ablation"]
    low = slurm("sbatch", "--partition=low", *of_one_node, LAUNCH, recipe, run, *further, **environment).strip()
    until(lambda: len(read_metrics(run)) >= 20, "steps of the job in the low partition")
    urgent = slurm("sbatch", "--partition=high", "--exclusive", "--parsable", "--wrap=sleep 1", "--output=/dev/null")
    until(lambda: slurm.job(urgent.strip())["JobState"] == "COMPLETED", "the job in the high partition")
    assert slurm.job(low)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING")
    until(lambda: slurm.job(low)["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), "its end")
    assert (slurm.job(low)["JobState"], slurm.job(low)["Restarts"]) == ("COMPLETED", "1"), out.read_text()[-6000:]

    def told(run):
        return [(row["step"], row["tokens"], row["loss"], row["grad_norm"]) for row in read_metrics(run)]

    assert told(run) == told(straight) and len(told(run)) == 200
    weights = sorted(path.relative_to(straight) for path in straight.glob("model*/*.safetensors"))
    assert len(weights) == 4 and all((run / name).read_bytes() == (straight / name).read_bytes() for name in weights)

    (undisturbed,) = (s for s in read_ledger(straight.parent).stages if s.stage == "pretrain")
    pieces = [s for s in read_ledger(run.parent).stages if s.stage == "pretrain"]
    assert [piece.status for piece in pieces] == ["interrupted", "done"]
    assert {piece.purpose for piece in pieces} == {"ablation"}  # the script hands on what else it is given
    assert sum(piece.tokens for piece in pieces) == undisturbed.tokens == 256 * 200  # no step was lost
    # what the interruption cost: devices that were held while ranks saved, started again and loaded
    unproductive = [s.device_seconds - s.productive_device_seconds for s in (undisturbed, *pieces)]
    assert all(s.productive_device_seconds > 0 for s in (undisturbed, *pieces))
    assert sum(unproductive[1:]) > unproductive[0] > 0
