"""Several processes at once, by torchrun on this machine."""

import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def torchrun():
    """torchrun(processes, *arguments) -> the finished process; arguments: a script or `-m baleen --` and its own."""

    def run(processes, *arguments, check=True, timeout=900, options=(), **environment):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run(
            [*command, *options, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        assert not check or done.returncode == 0, done.stderr[-6000:]
        return done

    return run
