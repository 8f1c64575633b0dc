"""The processes that torchrun started: how they find each other, agree, and name the one that fails them."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

import baleen
from baleen.config import UserError

T = TypeVar("T")
SPEAKING_SECONDS = 1.0  # that a rank which ends without a word leaves the one that speaks: torchrun then ends it too


def last_word_seconds(error: Exception, timeout_seconds: float) -> float:
    """How long ranks that gave up wait to hear from each other before one that is silent is named.

    Out of patience, they began to wait up to a step apart: a share of the time limit, which must be longer than many
    steps. Cut off from a rank that has ended, all notice at once.
    """
    is_late = any("timed out" in str(cause).lower() for cause in _causes(error))
    return max(5.0, timeout_seconds / 10) if is_late else 5.0


class RankLost(RuntimeError):
    """A rank that no longer answers: it hangs, was killed, or is cut off."""

    def __init__(self, places: list[str]):
        super().__init__(f"{'; '.join(places)} no longer answers: it hangs, was killed or is cut off")


def started_world() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def node_size() -> int:
    """Processes that torchrun started on each node; 0 without it. Their ranks are consecutive."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0"))


class Ranks:
    """This process among `world`. Alone, everything is a no-op."""

    def __init__(self, rank: int, world: int, store: Store | None = None):
        """store: for words between all of them, with none of an earlier start's in it; None: there is only one."""
        self.rank, self.world, self._store = rank, world, store

    @property
    def store(self) -> Store:
        assert self._store is not None, "one process has nobody to talk to"
        return self._store

    def lead(self, task: Callable[[], T]) -> T | None:
        """Run `task` on rank 0, while the others wait; its result there, None elsewhere.

        If it raises, it raises on rank 0 alone and the other ranks end without a word, with the exit code of `joined`.
        """
        result, fault = None, None
        if self.rank == 0:
            try:
                result = task()
            except Exception as error:
                fault = error
        code = self.largest([float(_exit_code(fault))])[0]
        if fault is not None:
            raise fault
        if code:
            time.sleep(SPEAKING_SECONDS)
            sys.exit(int(code))
        return result

    def largest(self, values: list[float]) -> list[float]:
        """Of each value, the largest that any rank gave."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_talk())
        return tensor.tolist()

    def places_of(self, found: bool) -> list[str]:
        """Of all ranks at which it was found: "rank 1 (host, process 4711)"."""
        at = self.largest([float(found and rank == self.rank) for rank in range(self.world)])
        return [_place(self, rank) for rank, here in enumerate(at) if here]

    def first_word(self, about: str, word: str | None) -> str | None:
        """What the lowest rank that has a word says, on all of them; None if none has. `about` is asked once."""
        if self.world == 1:
            return word
        first = -int(self.largest([-float(self.world if word is None else self.rank)])[0])
        if first == self.world:
            return None
        if word is not None and self.rank == first:
            self.store.set(f"word/{about}", word)
        return self.store.get(f"word/{about}").decode()

    def digest_of_all(self, digest: str) -> str:
        """One SHA-256 (as hex digits) over those of all ranks; alone, the own one."""
        if self.world == 1:
            return digest
        mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
        every = torch.empty(self.world * len(mine), dtype=torch.uint8)
        dist.all_gather_into_tensor(every, mine, group=_talk())
        return hashlib.sha256(bytes(every.tolist())).hexdigest()

    def require_equal(self, what: dict[str, str]) -> None:
        """Raises UserError, on rank 0, if another rank has other values: it names the first such rank."""
        if self.world == 1:
            return
        for name, value in what.items():
            self.store.set(f"{name}/{self.rank}", value)

        def compare() -> None:
            for rank in range(1, self.world):
                for name, value in what.items():
                    other = self.store.get(f"{name}/{rank}").decode()
                    if other != value:
                        raise UserError(
                            f"rank {rank} has another {name} than rank 0 ({other} against {value}): start all "
                            "processes with the same command from the same version"
                        )

        self.lead(compare)


ALONE = Ranks(0, 1)


@functools.cache
def fingerprint_of_code() -> str:
    """Of every source file of this package, and torch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    root = Path(baleen.__file__).parent
    for file in sorted(file for file in root.rglob("*") if file.suffix in (".py", ".cpp", ".h")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def joined(timeout_seconds: float) -> Iterator[Ranks]:
    """Join the processes of this run. A rank silent for `timeout_seconds` is named by those that wait for it.

    Of a fault one rank speaks, the first that finds it: there it is raised, and the others end without a word, with
    exit code 2 for a user's mistake, else 1. Raises RankLost where one rank fails the others by its silence.
    """
    world = started_world()
    if world == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    ranks = Ranks(dist.get_rank(), world, _fresh_store())
    ranks.store.set(f"place/{ranks.rank}", f"{socket.gethostname()}, process {os.getpid()}")
    rank_0 = _place(ranks, 0)  # now, for the store may be in that process, and go with it
    try:
        yield ranks
        dist.barrier()
    except Exception as error:
        told = _last_word(ranks, error, rank_0, last_word_seconds(error, timeout_seconds))
        if told is None:
            time.sleep(SPEAKING_SECONDS)
            sys.exit(_exit_code(error))
        if told is error:
            raise
        raise told from None
    dist.destroy_process_group()


def _exit_code(error: Exception | None) -> int:
    return 0 if error is None else 2 if isinstance(error, UserError) else 1


def limit_waiting(timeout_seconds: float) -> None:
    """In every group that this process is in: those of a mesh are made with PyTorch's own limit of 10 or 30 minutes."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def _fresh_store() -> Store:
    """With a prefix of this start: torchrun may keep its store over a restart, with what was said before in it."""
    start = torch.tensor([time.time_ns()])
    dist.broadcast(start, 0, group=_talk())
    return PrefixStore(f"baleen/{start.item()}", dist.distributed_c10d._get_default_store())


def _last_word(ranks: Ranks, error: Exception, rank_0: str, seconds: float) -> Exception | None:
    """What this rank has to tell of a failure: `error`, RankLost, or None where another rank tells."""
    answer: Future[Exception | None] = Future()

    def ask() -> None:
        try:
            answer.set_result(_of_failure(ranks, error, seconds))
        except RuntimeError:  # the store went with rank 0, whose end torchrun tells
            answer.set_result(error if ranks.rank == 0 else None)

    Thread(target=ask, daemon=True).start()  # asking a store in a process that is stopped never ends
    try:
        return answer.result(2 * seconds)
    except TimeoutError:
        if not _is_of_others(error):
            return error
        return RankLost([rank_0]) if ranks.rank == 1 else None


def _of_failure(ranks: Ranks, error: Exception, seconds: float) -> Exception | None:
    store = ranks.store
    if not _is_of_others(error):
        return error if store.add("fault", 1) == 1 else None
    if store.check(["fault"]):
        return None
    # whoever noticed a failure says so; whoever does not, caused it
    store.set(f"noticed/{ranks.rank}", "")
    deadline = time.monotonic() + seconds
    if store.add("asks", 1) > 1:  # the first asks for all, for one store answers thousands
        _said(store, "asked", deadline + seconds / 2)
        return None
    try:
        silent = [r for r in range(ranks.world) if not _said(store, f"noticed/{r}", deadline)]
        if store.add("fault", 1) > 1:
            return None
        return RankLost([_place(ranks, r) for r in silent]) if silent else error
    finally:
        store.set("asked", "")


def _is_of_others(error: BaseException) -> bool:
    """Whether it came of talking with other ranks. Gloo's errors are plain ones that name its source."""
    return any(
        isinstance(cause, dist.DistError)
        or (isinstance(cause, RuntimeError) and any(name in str(cause) for name in ("/gloo/", "NCCL")))
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came of: pipelines wrap what they meet."""
    while error is not None:
        yield error
        error = error.__cause__


def _said(store: Store, word: str, deadline: float) -> bool:
    try:
        store.wait([word], timedelta(seconds=max(deadline - time.monotonic(), 0.01)))
        return True
    except dist.DistStoreError:
        return False


def _place(ranks: Ranks, rank: int) -> str:
    return f"rank {rank} ({ranks.store.get(f'place/{rank}').decode()})"


def _talk() -> dist.ProcessGroup | None:
    """The group for a few numbers on the CPU: the default one speaks gloo there."""
    return dist.group.WORLD
