"""What one answer took: tokens, drafts, time, energy, money, and which experts its tokens went to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from baleen.cost.energy import Meter
from baleen.cost.money import RateCard
from baleen.data.tokenizer import Tokenizer
from baleen.serve.answers import CompletionDetails, PromptDetails, Usage
from baleen.serve.worker import Arrival


@dataclass(frozen=True)
class Tariff:
    """What the devices under the server cost, and how their energy is known."""

    devices: int
    rate: RateCard
    meter: Meter


@dataclass
class Tally:
    """Counts of one choice; `prompt_tokens` of its prompt."""

    prompt_tokens: int
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None
    cached_tokens: int = 0
    tokens: int = 0
    reasoning_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    joules: float | None = 0.0

    def take(self, arrival: Arrival) -> None:
        event = arrival.event
        self.last = arrival.time
        if event.token_ids and self.first is None:
            self.first = self.last
        self.cached_tokens = event.cached_tokens
        self.tokens += len(event.token_ids)
        self.drafted += event.drafted
        self.accepted += event.accepted
        self.seconds += arrival.seconds
        known = self.joules is not None and arrival.joules is not None
        self.joules = self.joules + arrival.joules if known else None  # type: ignore[operator]

    @property
    def whole_seconds(self) -> float:
        return (self.last or self.started) - self.started

    @property
    def first_seconds(self) -> float | None:
        return None if self.first is None else self.first - self.started

    @property
    def token_seconds(self) -> float | None:
        """From token to token, after the first."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)

    def stats(self, tariff: Tariff) -> dict[str, Any]:
        """For the extension field. Device time is the answer's share of the steps it was part of."""
        device_seconds = self.seconds * tariff.devices
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.tokens,
            "reasoning_tokens": self.reasoning_tokens,
            "seconds": self.whole_seconds,
            "first_token_seconds": self.first_seconds,
            "tokens_per_second": 1 / self.token_seconds if self.token_seconds else None,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "device_seconds": device_seconds,
            "joules": self.joules,
            "energy_how": tariff.meter.how,
            "usd": device_seconds / 3600 * tariff.rate.usd_per_device_hour,
            "usd_per_device_hour": tariff.rate.usd_per_device_hour,
            "watts_per_device": tariff.rate.watts_per_device,
        }


def usage_of(tallies: Sequence[Tally], prompts: int) -> Usage:
    """Over all choices; each of the first `prompts` tallies' prompts counts once, for n answers read it once."""
    per_prompt = len(tallies) // prompts
    read = sum(tally.prompt_tokens for tally in tallies[::per_prompt])
    written = sum(tally.tokens for tally in tallies)
    return Usage(
        prompt_tokens=read,
        completion_tokens=written,
        total_tokens=read + written,
        prompt_tokens_details=PromptDetails(cached_tokens=sum(tally.cached_tokens for tally in tallies[::per_prompt])),
        completion_tokens_details=CompletionDetails(reasoning_tokens=sum(tally.reasoning_tokens for tally in tallies)),
    )


def trace_of(arrival: Arrival, tokenizer: Tokenizer, parts: Sequence[str]) -> dict[str, Any]:
    """The extension's view of one arrival: its tokens, and the experts of those that the model has read by now."""
    event = arrival.event
    tokens = [
        {
            "text": tokenizer.token_bytes(id).decode(errors="replace"),
            "accepted": place < event.accepted,
            "part": part,
        }
        for place, (id, part) in enumerate(zip(event.token_ids, parts, strict=True))
    ]
    return {"tokens": tokens, "experts": [] if event.routes is None else event.routes.tolist()}


def join_traces(traces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The traces of an answer's arrivals as one."""
    return {key: [entry for trace in traces for entry in trace[key]] for key in ("tokens", "experts")}
