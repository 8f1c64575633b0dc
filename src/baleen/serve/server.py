"""`baleen serve RUN ...`: from the command's arguments to a server, and to its orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from baleen.config import UserError
from baleen.cost.energy import LastingMeter, open_meter
from baleen.cost.ledger import Ledger, Stage
from baleen.cost.money import RateCard, rate_card
from baleen.infer.engine import Engine, Speculate
from baleen.infer.native.runner import fastest_runner
from baleen.infer.native.weights import Format
from baleen.interop.load import Loaded
from baleen.model.machine import counted_devices
from baleen.recipe import cost_of
from baleen.serve.app import create_app
from baleen.serve.gate import is_loopback
from baleen.serve.limits import Limits
from baleen.serve.models import Models, load_models
from baleen.serve.service import Service
from baleen.serve.tally import Tariff
from baleen.serve.worker import Worker


@dataclass(frozen=True)
class Address:
    """Where to listen, who may ask. Raises UserError for an open door: a key is wanted beyond this machine."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise UserError("the API key must be printable ASCII: take another")
        if self.api_key is None and not is_loopback(self.host):
            raise UserError(f"{self.host} can be reached by others: give --api-key, or set BALEEN_API_KEY")

    @property
    def url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


class Server(uvicorn.Server):
    """Told to stop, it takes no more requests, lets answers under way end for the grace time, then ends them."""

    def __init__(self, app: FastAPI, service: Service, started: Callable[[], None] = lambda: None):
        self._service, self._started = service, started
        grace = service.limits.grace_seconds
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=round(grace) + 5,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        last = loop.call_later(self._service.limits.grace_seconds, self._service.worker.expire)
        await super().shutdown(sockets)
        last.cancel()


def serve(
    runs: Sequence[str],
    address: Address,
    limits: Limits,
    *,
    speculate: Speculate = "auto",
    max_batch: int = 256,
    cache_tokens: int | None = None,
    weights: Format | None = None,
    usd_per_device_hour: float = 0.0,
    say: Callable[[str], None],
) -> None:
    """Load the models, serve until SIGTERM or Ctrl-C, and book the time: on the first RUN that has a ledger."""
    door = listen(address)
    address = Address(address.host, door.getsockname()[1], address.api_key, address.origins)

    def engine(loaded: Loaded) -> Engine:
        return Engine(
            loaded.model,
            loaded.tokenizer,
            speculate=speculate,
            max_batch=max_batch,
            cache_tokens=cache_tokens,
            max_queue=limits.queue,
            queue_seconds=limits.queue_seconds,
            runner=partial(fastest_runner, format=weights),
        )

    # A thread that has computed keeps OpenMP's helpers as long as it lives, and those of the worker's would be put to
    # sleep between any two steps if there were more helpers than processors.
    with ThreadPoolExecutor(1) as passing:
        models = passing.submit(load_models, runs, engine).result()
    gc.freeze()  # what is there now stays: nobody need look through it for garbage again
    rate = rate_of(models, usd_per_device_hour)
    with stage_of(models, rate) as stage:
        service = make_service(models, limits, rate, stage)
        app = create_app(service, api_key=address.api_key, origins=address.origins)

        def started() -> None:
            say(f"{', '.join(models.names)} at {address.url} (the API: {address.url}/v1); Ctrl-C ends")

        with signals_end_quietly():
            Server(app, service, started).run(sockets=[door])


def make_service(models: Models, limits: Limits, rate: RateCard, stage: Stage | None = None) -> Service:
    """The service, whose steps are booked on the stage, if there is one."""
    device_name, devices = counted_devices()
    tokens, seconds = 0, 0.0

    def on_step(new: int, taken: float) -> None:
        nonlocal tokens, seconds
        tokens, seconds = tokens + new, seconds + taken
        if stage is not None:
            stage.progress(tokens=tokens, productive_seconds=seconds)

    meter = LastingMeter(open_meter(device_name, devices, rate.watts_per_device), rate.watts_per_device)
    worker = Worker(models.engines, devices=devices, meter=meter, on_step=on_step)
    return Service(models, worker, limits, Tariff(devices, rate, meter))


@contextlib.contextmanager
def stage_of(models: Models, rate: RateCard) -> Iterator[Stage | None]:
    """The ledger's stage of the first model that is a run of ours; a server of others' models has none."""
    run_dir = own_run(models)
    if run_dir is None:
        yield None
        return
    cost, (device_name, devices) = cost_of(run_dir), counted_devices()
    ledger = Ledger.open(run_dir, project=cost.project)
    with ledger.stage("serve", purpose=cost.purpose, devices=devices, device_name=device_name, rate=rate) as stage:
        yield stage


def own_run(models: Models) -> Path | None:
    return next((model.run_dir for model in models if model.run_dir is not None), None)


def rate_of(models: Models, usd_per_device_hour: float) -> RateCard:
    """What a device of this machine costs: as given if above 0, else as that run's recipe says, else by the table."""
    run_dir = own_run(models)
    own = cost_of(run_dir).usd_per_device_hour if run_dir else 0.0
    return rate_card(counted_devices()[0], usd_per_device_hour or own)


def listen(address: Address) -> socket.socket:
    """The listening socket. Raises UserError where the address can't be had."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"can't listen at {address.url} ({error}): give another --host or --port") from None


@contextlib.contextmanager
def signals_end_quietly() -> Iterator[None]:
    """uvicorn sends itself the signal again once it has ended in order: that is no reason to end otherwise."""
    old = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
