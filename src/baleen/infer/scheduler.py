"""Who runs in the next step: a bounded queue, admission by free pages, chunks of prompts, and who gives way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from baleen.config import UserError
from baleen.infer.pages import DRAFTED, ROOT, PagePool, page_key


class Busy(Exception):
    """The queue is full: the request may be sent again later."""


@dataclass(eq=False, slots=True)
class Job:
    """A request as the scheduler sees it: its tokens, how many of them the cache holds, and in which pages."""

    id: int
    tokens: list[int]  # of prompt and answer
    arrived: float
    reuse: int  # leading tokens, at most, whose latents may come from an earlier request
    drafts_for: bool = False  # the MTP layers read along: only pages that they have read are shared
    unread: int | None = None  # the first token that they have not, if they stopped
    drafts: list[int] = field(default_factory=list)  # to be verified behind the tokens
    computed: int = 0  # leading tokens that the cache holds
    cached: int = 0  # those of them that were there before
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of the full pages of `tokens`, as far as they were wanted
    started: bool = False  # it has run before, so it will not be told to come back later

    @property
    def remaining(self) -> int:
        """Tokens to read before the next can be said: 1 for an answer under way."""
        return len(self.tokens) - self.computed

    def key(self, index: int, page_size: int) -> bytes:
        """The key of page `index`, all of whose tokens are known."""
        while len(self.keys) <= index:
            first = len(self.keys) * page_size
            before = self.keys[-1] if self.keys else DRAFTED if self.drafts_for else ROOT
            self.keys.append(page_key(before, self.tokens[first : first + page_size]))
        return self.keys[index]


class Scheduler:
    """Answers under way move on in every step; `prefill_chunk` tokens of prompts are read beside them.

    First come, first served. Of a chunk the oldest prompt may take half, the rest goes to those that have had least
    of it yet: a long prompt keeps nobody waiting and is not kept waiting for ever. When pages run out, the youngest
    request gives its own back and returns to the head of the queue; what it had said stays said.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_batch: int,
        prefill_chunk: int,
        max_queue: int | None,
        queue_seconds: float | None,
        clock: Callable[[], float],
    ):
        self.pool = pool
        self.max_batch, self.prefill_chunk = max_batch, prefill_chunk
        self.max_queue, self.queue_seconds = max_queue, queue_seconds
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []  # in the order of admission
        self._clock = clock

    def pages_for(self, length: int) -> int:
        return -(-length // self.pool.page_size)

    def add(self, job: Job, *, bounded: bool) -> None:
        """Queue it. Raises Busy if `bounded` and the queue is full."""
        if bounded and self.max_queue is not None and len(self.waiting) >= self.max_queue:
            raise Busy(f"{len(self.waiting)} requests are waiting already: try again later")
        self.waiting.append(job)

    def remove(self, job: Job) -> None:
        """It is finished or given up: its pages are free at once."""
        if job in self.running:
            self.running.remove(job)
            self._let_go(job)
        else:
            self.waiting.remove(job)

    def expired(self) -> list[Job]:
        """Those that have waited too long."""
        if self.queue_seconds is None:
            return []
        latest = self._clock() - self.queue_seconds
        return [job for job in self.waiting if job.arrived < latest and not job.started]

    def plan(self) -> list[tuple[Job, int]]:
        """The jobs of the next step, each with how many tokens it reads, drafts included; fewest first."""
        size = self.pool.page_size
        for job in [job for job in self.running if len(job.tokens) + len(job.drafts) > len(job.pages) * size]:
            if job in self.running:  # and has not given way to one before it
                self._make_room(job)
        self._admit()
        prompts, answers = [], []
        for job in self.running:
            (prompts if job.remaining > 1 else answers).append(job)
        chunks = [*self._chunks(prompts), *((job, 1 + len(job.drafts)) for job in answers)]
        return sorted(chunks, key=lambda chunk: chunk[1])

    def advance(self, job: Job, computed: int) -> None:
        """The cache now holds the first `computed` tokens of the job; full pages of them can be found by others."""
        size = self.pool.page_size
        known = computed if job.unread is None else min(computed, job.unread)
        for index in range(job.computed // size, known // size):
            self.pool.publish(job.pages[index], job.key(index, size))
        job.computed = computed

    def _let_go(self, job: Job) -> None:
        self.pool.release(job.pages)
        job.pages, job.drafts, job.computed, job.unread = [], [], 0, None

    def _make_room(self, job: Job) -> None:
        """Pages for all its tokens and drafts, if need be those of the youngest."""
        missing = self.pages_for(len(job.tokens) + len(job.drafts)) - len(job.pages)
        while missing > self.pool.free:
            youngest = self.running.pop()
            self._let_go(youngest)
            self.waiting.appendleft(youngest)
            if youngest is job:
                return
        job.pages += self.pool.take(missing)

    def _admit(self) -> None:
        if not self.waiting:
            return
        size = self.pool.page_size
        in_the_making = {
            job.key(index, size)
            for job in self.running
            if job.remaining > 1
            for index in range(job.computed // size, min(len(job.tokens) - 1, job.reuse) // size)
        }
        for job in list(self.waiting):
            if len(self.running) >= self.max_batch:
                return
            usable = min(len(job.tokens) - 1, job.reuse) // size
            keys = [job.key(index, size) for index in range(usable)]
            found = self.pool.find(keys)
            if len(found) < usable and keys[len(found)] in in_the_making:
                continue  # cheaper to find it in a few steps than to compute it twice
            idle = [page for page in found if self.pool.is_idle(page)]
            missing = self.pages_for(len(job.tokens)) - len(found)
            spare = len(self.running)  # so that those who run can go on for a while
            if missing + spare > self.pool.free - len(idle):
                return
            self.pool.hold(found)
            job.pages = found + self.pool.take(missing)
            job.computed = len(found) * size
            if not job.started:
                job.cached, job.started = job.computed, True
            in_the_making.update(keys[len(found) :])
            self.waiting.remove(job)
            self.running.append(job)

    def _chunks(self, prompts: list[Job]) -> list[tuple[Job, int]]:
        """How the tokens of a step are shared among the prompts that are being read."""
        if not prompts:
            return []
        oldest, *others = prompts
        others.sort(key=lambda job: job.computed - job.cached)
        left, chunks = self.prefill_chunk, []
        half = max(-(-left // 2), left - sum(job.remaining for job in others))
        for job in (oldest, *others):
            count = min(job.remaining, half if job is oldest else left)
            if count:
                chunks.append((job, count))
                left -= count
        return chunks


def check_fits(needed: int, pool: PagePool) -> None:
    """Raises UserError for a request that would not find room in an empty cache."""
    if needed > pool.total * pool.page_size:
        raise UserError(
            f"the request may grow to {needed} tokens, but the cache holds {pool.total * pool.page_size}: "
            "lower max_tokens, or raise cache_tokens"
        )
