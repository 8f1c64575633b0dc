"""The processes that torchrun started: how they find each other, agree, and name the one that fails them."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

import baleen
from baleen.config import UserError

T = TypeVar("T")
LAST_WORD_SECONDS = 5.0  # how long ranks wait to hear from each other before one that is silent is named


class RankLost(RuntimeError):
    """A rank that no longer answers: it hangs, was killed, or is cut off."""


def started_world() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def node_size() -> int:
    """Processes that torchrun started on each node; 0 without it. Their ranks are consecutive."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0"))


class Ranks:
    """This process among `world`. Alone, everything is a no-op."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world

    def lead(self, task: Callable[[], T]) -> T | None:
        """Run `task` on rank 0, while the others wait; its result there, None elsewhere.

        If it raises, it raises on rank 0 alone and the other ranks end without a word.
        """
        result, fault = None, None
        if self.rank == 0:
            try:
                result = task()
            except Exception as error:
                fault = error
        failed = self.largest([float(fault is not None)])[0]
        if fault is not None:
            raise fault
        if failed:
            sys.exit(2)
        return result

    def largest(self, values: list[float]) -> list[float]:
        """Of each value, the largest that any rank gave."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_talk())
        return tensor.tolist()

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
        store = _store()
        for name, value in what.items():
            store.set(f"baleen/{name}/{self.rank}", value)

        def compare() -> None:
            for rank in range(1, self.world):
                for name, value in what.items():
                    other = store.get(f"baleen/{name}/{rank}").decode()
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
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def joined(timeout_seconds: float) -> Iterator[Ranks]:
    """Join the processes of this run. A rank silent for `timeout_seconds` is named by those that wait for it.

    A fault that all ranks find prints once. Raises RankLost where one rank fails the others.
    """
    world = started_world()
    if world == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    ranks = Ranks(dist.get_rank(), world)
    _store().set(f"baleen/place/{ranks.rank}", f"{socket.gethostname()}, process {os.getpid()}")
    try:
        yield ranks
        dist.barrier()
    except UserError:
        if ranks.rank and _said("fault", 0, LAST_WORD_SECONDS):
            sys.exit(2)  # rank 0 found the same fault and says so
        _store().set(f"baleen/fault/{ranks.rank}", "")
        raise
    except RuntimeError as error:
        _name_the_silent(ranks, error)
        raise
    dist.destroy_process_group()


def _name_the_silent(ranks: Ranks, error: RuntimeError) -> None:
    """Every rank that noticed a failure says so; whoever does not, caused it. One of the others tells."""
    store = _store()
    store.set(f"baleen/noticed/{ranks.rank}", "")
    deadline = time.monotonic() + LAST_WORD_SECONDS
    answering = [r for r in range(ranks.world) if _said("noticed", r, max(0.0, deadline - time.monotonic()))]
    silent = [r for r in range(ranks.world) if r not in answering]
    if not silent:
        return
    if ranks.rank != min(answering):
        sys.exit(1)
    places = "; ".join(f"rank {r} ({store.get(f'baleen/place/{r}').decode()})" for r in silent)
    raise RankLost(f"{places} no longer answers: it hangs, was killed or is cut off") from error


def _said(word: str, rank: int, seconds: float) -> bool:
    try:
        _store().wait([f"baleen/{word}/{rank}"], timedelta(seconds=max(seconds, 0.01)))
        return True
    except RuntimeError:
        return False


def _store():
    return dist.distributed_c10d._get_default_store()


def _talk() -> dist.ProcessGroup | None:
    """The group for a few numbers on the CPU: the default one speaks gloo there."""
    return dist.group.WORLD
