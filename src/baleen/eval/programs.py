"""Programs that a model wrote: run in a process of their own, with limits and without a network, and pass@k."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from functools import cache

from baleen.config import UserError

SECONDS = 5  # of CPU; twice as many by the clock
MEMORY_BYTES = 512 * 2**20
FILE_BYTES = 2**20
# Run before the program: network and process ids become the process's own, then the limits come, which nothing raises.
GUARD = """
import ctypes, os, resource, signal, sys
NEW_USER, NEW_PID, NEW_NET, DEATH_SIGNAL = 0x10000000, 0x20000000, 0x40000000, 1
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(NEW_NET | NEW_PID) and libc.unshare(NEW_USER | NEW_NET | NEW_PID):
    sys.exit({unguarded})
child = os.fork()  # the first process of the new ids: whatever it starts ends with it
if child:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)
libc.prctl(DEATH_SIGNAL, signal.SIGKILL)
for limit, value in ((resource.RLIMIT_CPU, {cpu}), (resource.RLIMIT_AS, {memory}), (resource.RLIMIT_FSIZE, {file}),
                     (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(limit, (value, value))
nonce, program = sys.stdin.readline(), sys.stdin.read()
sys.stdin = open(os.devnull)
exec(compile(program, "program", "exec"), {{"__name__": "__main__"}})
os.write({end}, nonce.encode())
"""
UNGUARDED = 77


def runs_without_fault(program: str) -> bool:
    """Whether a Python program runs to its last line, and ends by itself with exit code 0.

    It runs in an empty folder that is removed, in a process without environment or network (a namespace of its own),
    with SECONDS of CPU and MEMORY_BYTES; what it starts ends with it, and but for root it may start nothing. It may
    read and change this user's files, though it can tell nobody: take a container for models that you don't trust.
    Raises UserError where the network can't be taken away, which needs Linux with user namespaces.
    """
    _check_guard()
    return _run(program) == (0, True)


@cache
def _check_guard() -> None:
    if not sys.platform.startswith("linux"):
        raise UserError("programs are run only where their network can be taken away: use Linux for this task")
    found = _run("")
    if found[0] == UNGUARDED:
        raise UserError("this system does not let a process give up its network: allow user namespaces for this task")
    if found != (0, True):
        raise UserError(
            f"an empty program fails here (exit code {found[0]}), so none could pass: run Baleen where Python "
            "may start, fork and give up its network"
        )


def _run(program: str) -> tuple[int, bool]:
    """(exit code, whether the last line was reached: a program may leave before its tests)."""
    nonce = f"{secrets.token_hex(16)}\n"
    proof, end = os.pipe()
    guard = GUARD.format(cpu=SECONDS, memory=MEMORY_BYTES, file=FILE_BYTES, unguarded=UNGUARDED, end=end)
    try:
        with tempfile.TemporaryDirectory() as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", guard], cwd=folder, env={"HOME": folder}, text=True, pass_fds=(end,),
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            os.close(end)
            try:
                process.communicate(nonce + program, timeout=2 * SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        os.set_blocking(proof, False)
        with contextlib.suppress(BlockingIOError):
            return process.returncode, os.read(proof, len(nonce)) == nonce.encode()
        return process.returncode, False
    finally:
        os.close(proof)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that at least one of k programs drawn from `samples` is right, unbiased (arXiv 2107.03374, Eq. 1)."""
    assert 0 <= right <= samples and 1 <= k <= samples
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
