"""Who is woken by what a step brings."""

import pytest

from baleen.infer.engine import Event
from baleen.serve.errors import ApiError
from baleen.serve.worker import Arrival, Flight


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
