"""`baleen eval RUN`: what a saved model makes of text and tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from baleen.config import UserError, validated
from baleen.data.corpus import read_documents
from baleen.data.document import Document
from baleen.data.prepare import prepare
from baleen.eval.bits_per_byte import bits_per_byte
from baleen.eval.score import score_task
from baleen.eval.tasks import Program, Question, made_task, read_task
from baleen.infer.engine import Engine
from baleen.infer.logprobs import require_numbers
from baleen.interop.load import load
from baleen.recipe import DataConfig, recipe_sections, run_of

HARNESS = "lm-eval:"


def evaluate_run(
    run: Path,
    texts: Sequence[Path] = (),
    account: Callable[[], AbstractContextManager[Any]] = nullcontext,
    *,
    tasks: Sequence[str] = (),
    samples: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """{heldout, bits_per_byte, bytes, tokens} of text, and {tasks: {name: scores}}.

    A run is read in windows of the rows that it was trained on, another model in those of its context.
    heldout: the text is not `texts` but what the run held out.
    tasks: files of eval/tasks.py's form, names of tasks made of that text, or lm-eval:NAME and lm-eval:FILE.yaml.
    samples: programs written for each question that wants one. A model without text is scored by its tasks alone.

    `account` opens the ledger's stage, once the input is known to be good: what is refused costs nothing.
    Raises UserError if the run held out no text and neither texts nor tasks are given.
    """
    loaded = load(run)
    owner, sections = run_of(run), recipe_sections(run)
    # What a run never saw in training is no measure of it: positions beyond its rows.
    window = min(sections.get("train", {}).get("seq_len", math.inf), loaded.model.config.max_position_embeddings)
    documents: list[Document]
    if texts:
        documents = list(read_documents([str(text) for text in texts], "text"))
    elif owner is not None and "data" in sections:
        before = _prepared_before(owner)
        documents = prepare(
            validated(DataConfig, sections["data"], f"{owner}: [data]"),
            vocab_size=loaded.model.config.vocab_size,
            seq_len=sections["train"]["seq_len"],
            seed=sections["train"]["seed"],
            cache_dir=owner / "data",
            tokenizer=None if "model" in sections else loaded.tokenizer,  # trained on from a model that brought its own
            progress=say,
        ).heldout
        if before and _prepared_before(owner) != before:
            say(
                "the files of data.sources, or how they are read, are not as they were when the run was trained, so "
                "the held-out text was drawn anew: it may hold some that the run was trained on"
            )
    else:
        documents = []
    if not documents and not tasks:
        raise UserError(f"{run} has no text of its own that was held out: name a file with --text")
    questions = {name: _questions(name, documents) for name in tasks if not name.startswith(HARNESS)}
    if samples > 1 and not any(isinstance(of_one[0], Program) for of_one in questions.values()):
        raise UserError(f"--samples {samples} is of programs, and no task here wants one: leave it out")
    if any(name.startswith(HARNESS) for name in tasks):
        _harness()  # its absence is told before anything is measured
    result: dict[str, Any] = {"run": str(run)}
    with account():
        if documents:
            result["heldout"] = not texts
            result |= (found := bits_per_byte(loaded.model, loaded.tokenizer, documents, window=window))
            require_numbers(torch.tensor([float(number) for number in found.values()]))
        if tasks:
            engine = Engine(loaded.model, loaded.tokenizer, context=window)
            result["tasks"] = {
                name: score_task(engine, questions[name], samples=samples)
                if name in questions
                else _harness()(engine, name.removeprefix(HARNESS))
                for name in tasks
            }
    return result


def _prepared_before(run: Path) -> set[Path]:
    """Directories of prepared text that the run has."""
    return {path.parent for path in (run / "data").glob("*/stats.json")}


def write_evaluation(run: Path, result: dict[str, Any]) -> None:
    """RUN/eval.json: the last evaluation."""
    (run / "eval.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _questions(name: str, documents: Sequence[Document]) -> list[Question]:
    return read_task(Path(name)) if name.endswith(".jsonl") else made_task(name, documents)


def _harness() -> Callable[[Engine, str], dict[str, float]]:
    try:
        from baleen.eval.harness import score_by_harness
    except ImportError as error:
        raise UserError(f"tasks of lm-eval need it ({error}): pip install 'baleen-lm[eval]'") from None
    return score_by_harness
