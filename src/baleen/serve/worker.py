"""The thread on which all engines run, and the way to it from the event loop.

Commands go in by a queue and are obeyed between two steps. What a step brings is laid down with the flights it is for,
and one call into the loop wakes those who read: streams, and answers that are whole. Engines with work take turns, a
step each.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

from baleen.config import UserError
from baleen.cost.energy import Meter
from baleen.infer.engine import Busy, Engine, Event, Request
from baleen.serve.errors import ApiError, BadRequest

OnStep = Callable[[int, float], None]  # tokens that a step brought, and its seconds


class Arrival(NamedTuple):
    """What a step brought one answer of a flight, and the answer's share of what the step took.

    All answers that a step brings something share it alike. time: of the step's end, by time.perf_counter. joules: None
    where nobody knows.
    """

    index: int
    event: Event
    time: float
    seconds: float
    joules: float | None


class Flight:
    """The answers to one request of the API: iterate for arrivals inside `async with`, which frees them at its end.

    Iteration raises ApiError where the engine refuses, gives up or fails, and after `seconds`. streams: whether the
    arrivals are wanted one by one, or only once the answers are whole.
    """

    def __init__(self, worker: Worker, model: str, requests: Sequence[Request], seconds: float, streams: bool):
        self._worker, self.model, self.requests, self._seconds = worker, model, list(requests), seconds
        self._streams = streams
        self._arrivals: deque[Arrival | ApiError] = deque()
        self._flying = len(self.requests)  # answers without an end yet, as the worker knows
        self._unfinished = len(self.requests)  # as the reader knows
        self._awake = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._alarm = asyncio.get_running_loop().call_later(self._seconds, self._end_late)
        self._worker.take_off(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._alarm.cancel()
        if self._unfinished:
            self._worker.drop(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Arrival:
        if not self._unfinished:
            raise StopAsyncIteration
        while not self._arrivals:
            self._awake.clear()
            await self._awake.wait()
        arrival = self._arrivals.popleft()
        if isinstance(arrival, ApiError):
            raise arrival
        if arrival.event.finish_reason == "timeout":
            raise ApiError(429, "the server is busy: the request waited too long in its queue", code="queue_timeout")
        self._unfinished -= arrival.event.finish_reason is not None
        return arrival

    def bring(self, arrival: Arrival | ApiError) -> bool:
        """Lay an arrival down, on any thread; whether the reader is to be woken for it."""
        self._arrivals.append(arrival)
        if isinstance(arrival, ApiError):
            return True
        reason = arrival.event.finish_reason
        self._flying -= reason is not None
        return self._streams or not self._flying or reason == "timeout"

    def wake(self) -> None:
        """In the event loop only."""
        self._awake.set()

    def _end_late(self) -> None:
        self.bring(ApiError(408, f"the answer took longer than {self._seconds:g} seconds", code="request_timeout"))
        self.wake()


class Worker:
    """Owns the engines from `start` to `stop`: nobody else may touch them, but to read their counters.

    devices, meter: what a step's time and energy are counted by. on_step is called after each step, on the thread.
    """

    def __init__(self, engines: Mapping[str, Engine], *, devices: int, meter: Meter, on_step: OnStep):
        self._engines, self._devices, self._meter, self._on_step = dict(engines), devices, meter, on_step
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._places: dict[tuple[str, int], tuple[Flight, int]] = {}  # (model, the engine's id) -> whose answer it is
        self._unshared: dict[str, tuple[float, float]] = dict.fromkeys(engines, (0.0, 0.0))
        self._busy_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failed = False

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """End after the step under way; answers that are not finished fail."""
        self.expire()
        self._commands.put(None)
        self._thread.join()

    def take_off(self, flight: Flight) -> None:
        self._commands.put(lambda: self._submit(flight))

    def drop(self, flight: Flight) -> None:
        """Free what is left of a flight before the next step."""
        self._commands.put(lambda: self._abort(flight))

    def expire(self) -> None:
        """Let all answers under way fail, for the server is stopping."""
        self._commands.put(lambda: self._fail_all(ApiError(503, "the server is stopping", code="shutting_down")))

    # --- on the thread

    def _run(self) -> None:
        while True:
            try:
                if not self._obey(wait=not self._working()):
                    return
                for name in self._working():
                    self._step(name)
            except Exception:  # a fault of ours: no answer can be trusted any more, and no engine steps again
                traceback.print_exc(file=sys.stderr)
                self.failed = True
                with contextlib.suppress(Exception):  # all are told before any is freed, which may fail as well
                    self._fail_all(engine_failed())

    def _working(self) -> list[str]:
        return [] if self.failed else [name for name, engine in self._engines.items() if engine.has_work]

    def _obey(self, wait: bool) -> bool:
        """Carry out the commands that are there, waiting for the first if told to; False to end."""
        try:
            command = self._commands.get(block=wait)
            while command is not None:
                command()
                command = self._commands.get_nowait()
            return False
        except queue.Empty:
            return True

    def _step(self, name: str) -> None:
        started, joules_before = time.perf_counter(), self._meter.joules(self._busy_seconds * self._devices)
        try:
            events = self._engines[name].step()
        except UserError as error:  # of this model's weights: the others go on
            self._fail(name, ApiError(500, str(error), code="model_failed"))
            return
        now = time.perf_counter()
        seconds = now - started
        self._busy_seconds += seconds
        joules_after = self._meter.joules(self._busy_seconds * self._devices)
        self._on_step(sum(len(event.token_ids) for event in events), seconds)
        known = joules_before is not None and joules_after is not None
        spent, burnt = self._unshared[name]
        spent, burnt = spent + seconds, burnt + (joules_after - joules_before if known else 0.0)  # type: ignore[operator]
        if not events:  # part of a prompt: it is shared by those to whom the next step brings something
            self._unshared[name] = (spent, burnt)
            return
        self._unshared[name] = (0.0, 0.0)
        share, joules = spent / len(events), burnt / len(events) if known else None
        mail = []
        for event in events:
            place = name, event.request
            flight, index = self._places[place]
            if event.finish_reason is not None:
                del self._places[place]
            mail.append((flight, Arrival(index, event, now, share, joules)))
        self._post(mail)

    def _submit(self, flight: Flight) -> None:
        if self.failed:
            self._post([(flight, engine_failed())])
            return
        engine = self._engines[flight.model]
        try:
            for index, request in enumerate(flight.requests):
                self._places[flight.model, engine.submit(request)] = (flight, index)
        except Busy:
            self._refuse(flight, ApiError(429, "the server is busy: its queue is full", code="queue_full"))
        except UserError as error:
            self._refuse(flight, BadRequest(str(error)))
        except Exception:
            self._post([(flight, engine_failed())])  # it may have no place yet by which `_fail_all` would find it
            raise

    def _refuse(self, flight: Flight, error: ApiError) -> None:
        self._abort(flight)
        self._post([(flight, error)])

    def _abort(self, flight: Flight) -> None:
        for place, (owner, _) in list(self._places.items()):
            if owner is flight:
                del self._places[place]
                self._engines[place[0]].abort(place[1])

    def _fail_all(self, error: ApiError) -> None:
        self._fail(None, error)

    def _fail(self, model: str | None, error: ApiError) -> None:
        """All answers under way of a model, or of every one."""
        under_way = [flight for (name, _), (flight, _) in self._places.items() if model in (None, name)]
        flights = {id(flight): flight for flight in under_way}.values()
        self._post([(flight, error) for flight in flights])
        for flight in flights:
            self._abort(flight)

    def _post(self, mail: Sequence[tuple[Flight, Arrival | ApiError]]) -> None:
        assert self._loop is not None
        readers = [flight for flight, arrival in mail if flight.bring(arrival)]
        if readers:
            self._loop.call_soon_threadsafe(lambda: [flight.wake() for flight in readers])


def engine_failed() -> ApiError:
    return ApiError(500, "the engine failed, and the server's log says how: start it anew", code="engine_failed")
