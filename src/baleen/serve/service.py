"""What every endpoint needs: the models, the worker, the limits, the bill and the meters of one server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from baleen.infer.engine import Request
from baleen.infer.sampler import Constraint, SamplingParams
from baleen.serve.answers import FinishReason
from baleen.serve.errors import BadRequest
from baleen.serve.limits import Limits
from baleen.serve.metrics import Metrics
from baleen.serve.models import Models, Served
from baleen.serve.protocol import Sampling
from baleen.serve.tally import Tally, Tariff
from baleen.serve.worker import Arrival, Flight, Worker

P = TypeVar("P", bound="ChoicePart")
P_co = TypeVar("P_co", bound="ChoicePart", covariant=True)


@dataclass(kw_only=True)
class ChoicePart:
    """What one arrival brings one choice, in the protocol's words; `trace` for the extension field."""

    trace: dict[str, Any] | None
    finish_reason: FinishReason | None


class ChoiceOnItsWay(Protocol[P_co]):
    tally: Tally

    def take(self, arrival: Arrival) -> P_co: ...


class Service:
    def __init__(self, models: Models, worker: Worker, limits: Limits, tariff: Tariff):
        self.models, self.worker, self.limits, self.tariff = models, worker, limits, tariff
        self.metrics = Metrics(models, worker)

    async def parts(
        self, model: Served, requests: Sequence[Request], choices: Sequence[ChoiceOnItsWay[P]], *, streams: bool
    ) -> AsyncGenerator[tuple[int, P], None]:
        """Send the requests off; the parts of all choices, each with its choice's index, as they come or at the end."""
        async with Flight(self.worker, model.name, requests, self.limits.request_seconds, streams) as flight:
            async for arrival in flight:
                choice = choices[arrival.index]
                part = choice.take(arrival)
                if part.finish_reason is not None:
                    self.metrics.answered(model.name, choice.tally, part.finish_reason)
                    if part.trace is not None:
                        part.trace["stats"] = choice.tally.stats(self.tariff)
                yield arrival.index, part

    def check_choices(self, count: int) -> None:
        if count > self.limits.choices:
            message = f"the request asks for {count} answers: this server gives up to {self.limits.choices} at once"
            raise BadRequest(message, param="n", code="too_many_choices")


def sampling_params(request: Sampling, model: Served, defaults: SamplingParams, **own: Any) -> SamplingParams:
    """The protocol's parameters as the engine takes them; `defaults` for what is left out, `own` the endpoint's."""
    given = {
        name: value
        for name in ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty")
        if (value := getattr(request, name)) is not None
    }
    bias = logit_bias(request.logit_bias or {}, model.engine.model.config.vocab_size)
    return replace(defaults, **given, logit_bias=bias, stop=request.stops, trace=request.baleen.trace, **own)


def logit_bias(raw: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    beyond = [id for id in raw if int(id) >= vocab_size]
    if beyond:
        message = f"logit_bias names token {beyond[0]}, outside the vocabulary of {vocab_size}"
        raise BadRequest(message, param="logit_bias", code="invalid_value")
    return {int(id): bias for id, bias in raw.items()}


def of_choice(params: SamplingParams, place: int, constraint: Constraint | None = None) -> SamplingParams:
    """The parameters of one of n answers: a seed and a constraint of its own, where there are any."""
    seed = None if params.seed is None else params.seed + place
    return replace(params, seed=seed, constraint=constraint)
