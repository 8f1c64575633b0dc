"""Who runs when: order, shares of a chunk, who gives way, and the bounds of the queue."""

import pytest

from baleen.infer.pages import PagePool
from baleen.infer.scheduler import Busy, Job, Scheduler

SIZE = 4


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def scheduler(pages=100, max_batch=8, prefill_chunk=16, **bounds):
    bounds = {"max_queue": None, "queue_seconds": None, "clock": Clock(), **bounds}
    return Scheduler(PagePool(pages, SIZE), max_batch=max_batch, prefill_chunk=prefill_chunk, **bounds)


def job(number, length, token=None):
    """A prompt of `length` tokens unlike any other, or all `token`."""
    tokens = [1000 * number + i for i in range(length)] if token is None else [token] * length
    return Job(number, tokens, arrived=0.0, reuse=length)


def run(scheduler, plan):
    """What an engine does: read, and say one token where a prompt or answer is at its end."""
    for job, count in plan:
        ends = count >= job.remaining
        if ends:
            job.tokens.append(7)
        scheduler.advance(job, min(job.computed + count, len(job.tokens) - 1))
    return [(job.id, count) for job, count in plan]


def test_prompts_are_read_in_chunks_beside_answers():
    s = scheduler()
    s.add(job(0, 40), bounded=True)
    assert [run(s, s.plan()) for _ in range(3)] == [[(0, 16)], [(0, 16)], [(0, 8)]]
    s.add(job(1, 20), bounded=True)
    assert [run(s, s.plan()) for _ in range(3)] == [[(0, 1), (1, 16)], [(0, 1), (1, 4)], [(0, 1), (1, 1)]]


def test_a_long_prompt_keeps_nobody_waiting_and_does_not_wait_for_ever():
    s = scheduler(pages=200)
    s.add(job(0, 400), bounded=True)
    run(s, s.plan())
    short = 0
    for number in range(1, 40):  # for ever new short prompts
        s.add(job(number, 8), bounded=True)
        plan = s.plan()
        assert dict((j.id, n) for j, n in plan)[0] == 8
        short += any(j.id == number and n == 8 for j, n in plan)
        run(s, plan)
        for done, _ in plan:
            if done.id and done.remaining == 1:
                s.remove(done)
    assert short == 39


def test_among_others_those_go_first_that_had_least():
    s = scheduler(prefill_chunk=20)
    for number, length in enumerate((100, 90, 6)):
        s.add(job(number, length), bounded=True)
    assert run(s, s.plan()) == [(0, 10), (1, 10)]
    assert run(s, s.plan()) == [(1, 4), (2, 6), (0, 10)]


def test_first_come_first_served():
    s = scheduler(pages=12, max_batch=3)
    for number, length in enumerate((12, 60, 4, 4)):
        s.add(job(number, length), bounded=True)
    s.plan()
    assert [j.id for j in s.running] == [0]  # 1 does not fit yet, and 2 does not overtake it
    s.remove(s.running[0])
    s.remove(s.waiting[0])
    s.plan()
    assert [j.id for j in s.running] == [2, 3]


def test_the_youngest_gives_way_and_returns_first():
    s = scheduler(pages=4, prefill_chunk=100)
    a, b = job(0, 7), job(1, 5)
    for j in (a, b):
        s.add(j, bounded=True)
    steps = [sorted(run(s, s.plan())) for _ in range(8)]
    assert steps[0] == [(0, 7)]  # b fits, but would leave no page to grow by
    assert {id for step in steps for id, _ in step} == {0}
    s.remove(a)
    run(s, s.plan())
    assert [j.id for j in s.running] == [1]
    s.pool.take(s.pool.free)
    b.tokens += [1, 2, 3]
    b.computed += 3
    assert s.plan() == [] and [j.id for j in s.waiting] == [1] and b.pages == [] and b.computed == 0


def test_who_has_given_way_takes_no_room_in_the_same_step():
    """Both need a page and there is none: the younger's goes to the older, and the younger asks for nothing."""
    s = scheduler(pages=6)
    a, b = job(0, 3), job(1, 3)
    for j in (a, b):
        s.add(j, bounded=True)
    for _ in range(2):
        run(s, s.plan())
    s.pool.take(s.pool.free)
    assert len(a.tokens) == len(b.tokens) == SIZE + 1
    assert s.plan() == [(a, 1)] and s.running == [a] and [*s.waiting] == [b]
    assert len(a.pages) == 2 and b.pages == []


def test_an_equal_prompt_waits_for_the_pages_in_the_making():
    s = scheduler(prefill_chunk=8)
    a, b, c = job(0, 17, token=3), job(1, 17, token=3), job(2, 3)
    for j in (a, b, c):
        s.add(j, bounded=True)
    assert run(s, s.plan()) == [(2, 3), (0, 5)]
    assert [run(s, s.plan()) for _ in range(2)] == [[(2, 1), (0, 8)], [(2, 1), (0, 4)]]
    assert run(s, s.plan()) == [(0, 1), (2, 1), (1, 1)]
    assert (b.cached, b.computed) == (16, 17) and b.pages[:4] == a.pages[:4] and b.pages[4] != a.pages[4]


def test_the_last_token_is_always_read():
    """Its hidden state says what comes next."""
    s = scheduler()
    for number in range(2):
        s.add(job(number, 16, token=5), bounded=True)
        run(s, s.plan())
        s.remove(s.running[0])
    s.add(last := job(2, 16, token=5), bounded=True)
    assert s.plan() == [(last, 4)] and last.cached == 12


def test_bounds_of_the_queue():
    clock = Clock()
    s = scheduler(max_batch=1, max_queue=2, queue_seconds=10.0, clock=clock)
    s.add(job(0, 4), bounded=True)
    s.plan()
    for number in (1, 2):
        s.add(job(number, 4), bounded=True)
    with pytest.raises(Busy, match="2 requests are waiting"):
        s.add(job(3, 4), bounded=True)
    s.add(job(4, 4), bounded=False)
    s.waiting[-1].arrived = 9.0
    clock.now = 10.0
    assert s.expired() == []
    clock.now = 10.5
    assert [j.id for j in s.expired()] == [1, 2]
