"""Who is woken by what a step brings, and who is billed for it."""

from types import SimpleNamespace

import pytest

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
