"""Who is woken by what a step brings, and who is billed for it."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from baleen.config import UserError
from baleen.cost.energy import EstimatedMeter
from baleen.infer.engine import Event
from baleen.serve import worker as worker_module
from baleen.serve.errors import ApiError
from baleen.serve.worker import Arrival, Flight, Worker


def arrival(index, reason=None):
    return Arrival(index, Event(index, "a", (7,), 0, reason), time=0.0, seconds=0.0, joules=None)


@pytest.mark.parametrize("last", ["stop", "timeout"])
def test_whole_answers_wake_nobody_before_the_last_has_ended(last):
    flight = Flight(None, "tiny", ["first", "second"], 1.0, streams=False)
    assert [flight.bring(arrival(i, reason)) for i, reason in ((0, None), (1, None), (0, "length"))] == [False] * 3
    assert flight.bring(arrival(1, last))


def test_what_ends_a_flight_early_wakes_its_reader():
    for end in (arrival(1, "timeout"), ApiError(503, "the server is stopping", code="shutting_down")):
        assert Flight(None, "tiny", ["first", "second"], 1.0, streams=False).bring(end)


def test_streams_are_woken_by_every_arrival():
    assert Flight(None, "tiny", ["first"], 1.0, streams=True).bring(arrival(0))


class Faulty:
    """An engine that takes two requests, says nothing, and breaks where it is told to."""

    def __init__(self, breaks):
        self.breaks, self.requests, self.steps = breaks, [], 0

    def _may_break(self, place):
        if place in self.breaks:
            raise RuntimeError(f"planted in {place}")

    @property
    def has_work(self):
        return bool(self.requests)

    def submit(self, request):
        if request == "bad":
            self._may_break("submit")
        self.requests.append(request)
        return len(self.requests)

    def abort(self, id):
        self._may_break("abort")

    def step(self):
        self.steps += 1
        self._may_break("step")
        time.sleep(0.001)
        return []


async def fault_of(worker, request):
    with pytest.raises(ApiError) as caught:
        async with asyncio.timeout(20), Flight(worker, "tiny", [request], 60.0, streams=True) as flight:
            await anext(flight)
    return caught.value.code


@pytest.mark.parametrize("breaks", [("submit",), ("submit", "abort"), ("step",), ("step", "abort"), ("abort",)])
def test_what_breaks_is_told_to_all_and_the_thread_lives_on(breaks, capsys):
    engine = Faulty(breaks)
    worker = Worker({"tiny": engine}, devices=1, meter=EstimatedMeter(10.0), on_step=lambda *_: None)

    async def talk():
        worker.start(asyncio.get_running_loop())
        other = asyncio.create_task(fault_of(worker, "good"))
        if "submit" in breaks:
            await asyncio.sleep(0.05)
            assert await fault_of(worker, "bad") == "engine_failed"
        elif breaks == ("abort",):
            async with Flight(worker, "tiny", ["good"], 60.0, streams=True):
                await asyncio.sleep(0.05)
        assert await other == "engine_failed"
        steps = engine.steps
        assert await fault_of(worker, "good") == "engine_failed" and engine.steps == steps  # it is not asked again

    asyncio.run(talk())
    assert worker.failed and worker._thread.is_alive()
    worker.stop()
    assert "planted in" in capsys.readouterr().err and not worker._thread.is_alive()


def test_a_model_that_gives_no_numbers_fails_alone():
    class Spoilt(Faulty):
        def abort(self, id):
            self.requests.clear()

        def step(self):
            raise UserError("the model's logits are no numbers")

    spoilt, sound = Spoilt(()), Faulty(())
    worker = Worker({"tiny": spoilt, "other": sound}, devices=1, meter=EstimatedMeter(10.0), on_step=lambda *_: None)

    async def talk():
        worker.start(asyncio.get_running_loop())
        async with Flight(worker, "other", ["good"], 60.0, streams=True) as other:
            assert await fault_of(worker, "good") == "model_failed"
            with pytest.raises(TimeoutError):  # still under way
                await asyncio.wait_for(anext(other), 0.05)

    asyncio.run(asyncio.wait_for(talk(), 20))
    assert not worker.failed
    worker.stop()


def test_a_step_is_billed_once_with_the_prompt_read_before_it(monkeypatch):
    steps = iter([[], [Event(0, "a", (7,), 0, None), Event(1, "b", (8,), 0, "stop")]])
    engine, mail = SimpleNamespace(step=lambda: next(steps)), []
    worker = Worker({"tiny": engine}, devices=2, meter=EstimatedMeter(10.0), on_step=lambda *_: None)
    flight = Flight(worker, "tiny", ["first", "second"], 1.0, streams=True)
    worker._places = {("tiny", 0): (flight, 0), ("tiny", 1): (flight, 1)}
    clock = SimpleNamespace(perf_counter=iter([0.0, 1.0, 5.0, 8.0]).__next__)
    monkeypatch.setattr(worker_module, "time", clock)
    monkeypatch.setattr(worker, "_post", mail.extend)
    worker._step("tiny")  # reads a prompt for one second and says nothing
    worker._step("tiny")  # three seconds later both have a token
    assert [(arrival.seconds, arrival.joules) for _, arrival in mail] == [(2.0, 40.0)] * 2
