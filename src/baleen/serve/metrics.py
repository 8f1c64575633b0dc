"""/metrics: what the server is doing, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from baleen.serve.models import Models
from baleen.serve.tally import Tally
from baleen.serve.worker import Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counts of finished answers and requests; what the engines are at is read when somebody asks."""

    def __init__(self, models: Models, worker: Worker):
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(models, worker))
        each = {"labelnames": ["model"], "registry": self._registry}
        self._responses = Counter(
            "baleen_http_responses", "Responses by path and status", ["path", "status"], registry=self._registry
        )
        self._answers = Counter(
            "baleen_answers", "Answers by the reason of their end", ["model", "finish_reason"], registry=self._registry
        )
        self._prompt = Counter("baleen_prompt_tokens", "Tokens of prompts", **each)
        self._cached = Counter("baleen_cached_prompt_tokens", "Tokens of prompts that were in the cache", **each)
        self._written = Counter("baleen_completion_tokens", "Tokens of answers", **each)
        self._drafted = Counter("baleen_drafted_tokens", "Tokens drafted by MTP", **each)
        self._accepted = Counter("baleen_accepted_tokens", "Drafted tokens that were kept", **each)
        self._joules = Counter("baleen_joules", "Energy of the answers", **each)
        self._first = Histogram("baleen_first_token_seconds", "Until the first token", buckets=SECONDS, **each)
        self._between = Histogram("baleen_token_seconds", "From token to token", buckets=TOKEN_SECONDS, **each)
        self._whole = Histogram("baleen_answer_seconds", "Until the last token", buckets=SECONDS, **each)

    def responded(self, path: str, status: int) -> None:
        self._responses.labels(path, str(status)).inc()

    def answered(self, model: str, tally: Tally, finish_reason: str) -> None:
        self._answers.labels(model, finish_reason).inc()
        self._prompt.labels(model).inc(tally.prompt_tokens)
        self._cached.labels(model).inc(tally.cached_tokens)
        self._written.labels(model).inc(tally.tokens)
        self._drafted.labels(model).inc(tally.drafted)
        self._accepted.labels(model).inc(tally.accepted)
        self._joules.labels(model).inc(tally.joules or 0.0)
        if tally.first_seconds is not None:
            self._first.labels(model).observe(tally.first_seconds)
        if tally.token_seconds is not None:
            self._between.labels(model).observe(tally.token_seconds)
        self._whole.labels(model).observe(tally.whole_seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Engines(Collector):
    def __init__(self, models: Models, worker: Worker):
        self._models, self._worker = models, worker

    def collect(self) -> Iterable[GaugeMetricFamily]:
        running = GaugeMetricFamily("baleen_running", "Answers being written", labels=["model"])
        waiting = GaugeMetricFamily("baleen_waiting", "Answers in the queue", labels=["model"])
        used = GaugeMetricFamily("baleen_cache_pages_in_use", "Pages of the latent cache in use", labels=["model"])
        total = GaugeMetricFamily("baleen_cache_pages", "Pages of the latent cache", labels=["model"])
        for model in self._models:
            engine = model.engine
            running.add_metric([model.name], engine.running)
            waiting.add_metric([model.name], engine.waiting)
            used.add_metric([model.name], engine.pages.in_use)
            total.add_metric([model.name], engine.pages.total)
        yield from (running, waiting, used, total)
        yield GaugeMetricFamily("baleen_healthy", "0 once an engine has failed", value=float(not self._worker.failed))
