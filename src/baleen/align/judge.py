"""Rewards are run in a process of their own: a verifier may raise, hang or print what it likes, and the run goes on.

A verdict that failed is worth 0 and is counted by kind: raised, timed_out (the process is replaced, and what it had
started ends with it), not_finite. The process reaches no network and starts no other: a reward that tries has raised,
even if it hides that. It is no sandbox against malice; name only functions you trust.

Requests and replies are lines of JSON: {"load": spec} -> {} and {"reward": spec, "arguments": [prompt, completion,
answer]} -> {"value": x}, or {"error": text} to either.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from baleen.align.rewards import REWARDS, Reward, math_verify
from baleen.align.tasks import gym_entry
from baleen.config import UserError
from baleen.infer.answers import answer_of

START_SECONDS = 60.0  # for the process to come up and to import a reward
LARGEST = 3.4028234663852886e38  # of float32, in which advantages are
NETWORK = (
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg", "socket.bind",
)  # fmt: skip
PROCESSES = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.forkpty", "os.exec", "pty.spawn")


class Verdict(NamedTuple):
    value: float
    failure: str | None = None  # raised, timed_out or not_finite; the value is 0 then


class Judge:
    """Scores answers by named rewards, each within `seconds`. A context manager, which ends the process."""

    def __init__(self, specs: Sequence[str], seconds: float):
        self.seconds = seconds
        self.asked = 0
        self.failures: Counter[str] = Counter()
        self.last_error = ""
        self._specs = [absolute(spec) for spec in specs]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Raises UserError if a reward cannot be loaded."""
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def score(self, spec: str, prompt: str, completion: str, answer: str) -> Verdict:
        """One reward of one completion."""
        self.asked += 1
        if self._process is None:
            try:
                self._start()
            except UserError as error:  # it could be loaded when the run began
                return self._failed("raised", str(error))
        reply = self._ask({"reward": absolute(spec), "arguments": [prompt, completion, answer]}, self.seconds)
        if reply is None:
            self._stop()
            return self._failed("timed_out", f"{spec} took more than {self.seconds:g} s, or ended its process")
        if "error" in reply:
            return self._failed("raised", f"{spec}: {reply['error']}")
        if not abs(reply["value"]) <= LARGEST:
            return self._failed("not_finite", f"{spec} gave {reply['value']}")
        return Verdict(reply["value"])

    @property
    def fault(self) -> str:
        """How many verdicts failed, in words; empty if none did."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.failures.items())
        return f"rewards failed and are worth 0, so far {kinds}: {self.last_error}" if kinds else ""

    def close(self, warn: Callable[[str], None]) -> None:
        """Before a result is told: warns of verdicts that failed. Raises UserError if all of them did."""
        if self.fault and self.failures.total() == self.asked:
            raise UserError(f"every reward failed, so nothing can be said of the answers: {self.last_error}")
        if self.fault:
            warn(self.fault)

    def _failed(self, kind: str, error: str) -> Verdict:
        self.failures[kind] += 1
        self.last_error = error
        return Verdict(0.0, kind)

    def _start(self) -> None:
        command = [sys.executable, "-m", "baleen.align.judge"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # A session of its own: Ctrl-C is for the run, and all that it starts can be ended with it.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        for spec in self._specs:
            reply = self._ask({"load": spec}, START_SECONDS)
            if reply is None or "error" in reply:
                self._stop()
                reason = "its module does not finish importing" if reply is None else reply["error"]
                raise UserError(f"the reward {spec!r} cannot be loaded: {reason}")

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The reply, or None if none came in time."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        line = process.stdout.readline()  # a reply is written at once
        return json.loads(line) if line else None


def absolute(spec: str) -> str:
    """FILE.py:FUNCTION with the file's whole path, so that the process finds it."""
    file, separator, function = spec.rpartition(":")
    return f"{Path(file).expanduser().absolute()}:{function}" if separator and file.endswith(".py") else spec


def load_reward(spec: str) -> Reward:
    """A name of REWARDS, reasoning_gym:TASK, or FILE.py:FUNCTION, which is imported: it is trusted code.

    Raises UserError if there is no such reward.
    """
    if spec in REWARDS:
        if spec == "expression":
            math_verify()  # now, not at the first verdict
        return REWARDS[spec]
    where, _, name = spec.rpartition(":")
    if where == "reasoning_gym":
        return _gym_reward(name)
    if not where.endswith(".py"):
        raise UserError(f"there is no reward {spec!r}: take {', '.join(REWARDS)}, accuracy, or FILE.py:FUNCTION")
    if not Path(where).is_file():
        raise UserError(f"{where} is missing")
    module_spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    function: Reward | None = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{where} has no function {name}")
    return function


def _gym_reward(task: str) -> Reward:
    gym = importlib.import_module("reasoning_gym")
    score = gym.get_score_answer_fn(task)

    @functools.lru_cache(maxsize=4096)
    def entry(answer: str) -> dict[str, Any]:
        return gym_entry(task, **json.loads(answer))

    def reward(prompt: str, completion: str, answer: str) -> float:
        return float(score(answer_of(completion), entry(answer)))

    return reward


class _Guard:
    """An audit hook that refuses the network, and while a verdict is made processes, and remembers what it refused."""

    def __init__(self) -> None:
        self.refused, self.judging = "", False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in NETWORK or (self.judging and event in PROCESSES):
            self.refused = event
            raise PermissionError(f"a reward may neither use the network nor start a process ({event})")

    def verdict(self, reward: Reward, arguments: Sequence[str]) -> float:
        """Raises PermissionError also where the reward has caught that."""
        self.refused, self.judging = "", True
        try:
            value = float(reward(*arguments))
        finally:
            self.judging = False
        if self.refused:
            raise PermissionError(f"it tried what a reward may not ({self.refused})")
        return value


def serve() -> None:
    """The process's loop: answers on the true stdout, so that what a reward prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    guard = _Guard()
    sys.addaudithook(guard)
    loaded: dict[str, Reward] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            spec = request.get("load") or request["reward"]
            if spec not in loaded:
                loaded[spec] = load_reward(spec)
            reply = {} if "load" in request else {"value": guard.verdict(loaded[spec], request["arguments"])}
        except Exception as error:  # whatever a user's function raises
            reply = {"error": f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve()
