"""Tasks of EleutherAI's lm-eval on our engine: local YAML files without a network, the others where there is a hub."""

# lm-eval is an extra that lint goes without
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from baleen.config import UserError
from baleen.eval.likelihood import Likelihood, likelihoods
from baleen.eval.score import beginning, fitting
from baleen.infer.engine import Engine, Request
from baleen.infer.sampler import SamplingParams

MAX_TOKENS = 256  # of an answer whose task names no bound


class EngineLM(LM):
    """What lm-eval asks of a model, answered by an engine in batches of its own."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.engine = engine

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log p of the continuation after the context, whether it is greedy), natural logarithms."""
        found = likelihoods(self.engine, [self._encoded(*request.args) for request in requests])
        return [(f.log_likelihood, f.greedy) for f in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p of whole texts, in windows of the context, each token counted once with at most half a window before it
        cut away."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            ids = beginning(self.engine.tokenizer, request.args[0])
            half = self.engine.context // 2
            for start in range(1, len(ids), half):
                pairs.append((ids[max(0, start - half) : start], ids[start : start + half]))
                owners.append(owner)
        found: Sequence[Likelihood] = likelihoods(self.engine, pairs)
        totals = [0.0] * len(requests)
        for owner, part in zip(owners, found, strict=True):
            totals[owner] += part.log_likelihood
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        asked = [self._request(*request.args) for request in requests]
        return [completion.text for completion in self.engine.complete(asked)]

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval has it: spaces at the end of the context belong to the continuation."""
        tokenizer = self.engine.tokenizer
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole, before = beginning(tokenizer, context + continuation), beginning(tokenizer, context)
        rest = whole[len(before) :]  # nothing, where one token crosses the border and no other follows
        return (whole[: len(before)], rest) if rest else (before, tokenizer.encode(continuation))

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        engine = self.engine
        stop = settings.get("until") or ()
        wanted = settings.get("max_gen_toks", MAX_TOKENS)
        ids, room = fitting(engine, beginning(engine.tokenizer, context), wanted)
        temperature = settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0
        params = SamplingParams(
            temperature=temperature, top_p=settings.get("top_p", 1.0), max_tokens=room, seed=0,
            stop=(stop,) if isinstance(stop, str) else tuple(s for s in stop if s),
        )  # fmt: skip
        return Request(ids, params)


def score_by_harness(engine: Engine, task: str) -> dict[str, float]:
    """{metric: value} of a task that lm-eval knows by name, or of one that a local YAML file defines.

    Raises UserError for an unknown name, and for a task whose data lm-eval can't get.
    """
    file = Path(task)
    local = file.suffix in (".yaml", ".yml")
    if local and not file.is_file():
        raise UserError(f"{file} is missing: name a task of lm-eval or a YAML file of one")
    manager = TaskManager(include_path=str(file.parent) if local else None, include_defaults=not local)
    name = _name_in(file) if local else task
    if name not in manager.all_tasks:
        raise UserError(f"lm-eval knows no task {name!r}: `lm-eval ls tasks` lists them")
    try:
        # its decorator hides its signature from type checkers
        evaluate: Any = simple_evaluate
        found = evaluate(
            model=EngineLM(engine), tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=False
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(f"lm-eval can't get the data of {name} ({error}): give it a network, or local data") from None
    scores = found["results"][name]
    return {
        key.removesuffix(",none"): float(value)
        for key, value in scores.items()
        if isinstance(value, int | float) and not key.startswith("alias")
    }


def _name_in(file: Path) -> str:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads past the functions that task files may name."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        described = yaml.load(file.read_text(encoding="utf-8"), Loader)  # a safe one
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(described, dict) or not isinstance(described.get("task"), str):
        raise UserError(f"{file} names no task: it needs `task: NAME`")
    return described["task"]
