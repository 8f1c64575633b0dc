"""The claim on context: a model of short texts is extended in two stages, and asked for what it read long before.

Shapes: T tokens.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from claim import EXTENSIONS, digest_of
from measures import largest_jump, longest_spike
from needles import questions_of, write_needles

from baleen.data.document import Document
from baleen.data.prepare import prepare
from baleen.data.tokenizer import Tokenizer
from baleen.eval.token_loss import token_nats
from baleen.interop.load import load
from baleen.model.transformer import Transformer
from baleen.recipe import Recipe, read_recipe
from baleen.train.context import with_context
from baleen.train.continued import train_on
from baleen.train.continued_recipe import ContextConfig, ContinuedRecipe
from baleen.train.loop import run_stage, train
from baleen.train.rundir import read_metrics

CHARS = {256: 750, 1024: 3000, 4096: 12500}  # of a document that fits so many tokens
DOCUMENTS = {256: 128, 1024: 64, 4096: 20}  # that are asked, of those held out
BINS = (0, 256, 1024, 2048, 4096)  # positions over which losses are averaged


def extend_row(recipe: Recipe, run_dir: Path, *, cache: Path) -> tuple[dict[str, Any], list[Path]]:
    """{measure: value} of a base trained on 256 tokens and extended to 1K and 4K with the recipe's rope, and the runs
    that it took.

    The base is trained without that rope; arms that differ in it alone share it, and the first one pays for it. Raises
    KeyboardInterrupt if stopped.
    """
    short = _short(recipe, cache)
    base = _base(recipe, cache)
    paid = base.with_name(f"{base.name}-paid-by")  # the row whose account it is in
    if not paid.is_file():
        paid.parent.mkdir(parents=True, exist_ok=True)
        paid.write_text(run_dir.name, encoding="utf-8")
    if _unfinished(base):
        _finished(train(short, base, resume=(base / "recipe.toml").exists()))
    context = ContextConfig.model_validate(
        {"max_position_embeddings": recipe.model.max_position_embeddings, "rope_scaling": recipe.model.rope_scaling}
    )
    before, tokenizer, _ = load(base)
    with run_stage(recipe.cost, run_dir, "eval"):
        found = _measured(with_context(before, context), tokenizer, recipe, cache)
    measured = {f"before_{name}": value for name, value in found.items()}
    last, run_dirs = base, []
    for name in EXTENSIONS:
        run_dirs.append(run_dir if name == EXTENSIONS[-1] else run_dir.with_name(f"{run_dir.name}-{name}"))
        if _unfinished(run_dirs[-1]):
            resume = (run_dirs[-1] / "recipe.toml").exists()
            _finished(train_on(_stage(name, recipe, last, cache), run_dirs[-1], only="all", resume=resume))
        last = run_dirs[-1]
    with run_stage(recipe.cost, run_dir, "eval"):
        measured |= _measured(load(last).model, tokenizer, recipe, cache)
    run_dirs += [base] * (paid.read_text(encoding="utf-8") == run_dir.name)
    losses_of_runs = [[row["loss"] for row in read_metrics(done)] for done in run_dirs]
    measured |= {
        "largest_jump": max(map(largest_jump, losses_of_runs)),
        "longest_spike": max(map(longest_spike, losses_of_runs)),
        "skipped": sum(losses.count(None) for losses in losses_of_runs),
    }
    return measured, run_dirs


def _base(recipe: Recipe, cache: Path) -> Path:
    """Where the base of all arms with this seed lies, named by its own recipe."""
    digest = hashlib.sha256(_short(recipe, cache).to_toml().encode()).hexdigest()[:12]
    return cache.parent / f"context-base-{digest}"


def _unfinished(run_dir: Path) -> bool:
    return not (run_dir / "model").exists()


def _finished(summary: dict[str, Any]) -> None:
    if summary["status"] != "done":
        raise KeyboardInterrupt


def _needles(length: int, cache: Path) -> Path:
    file = cache.parent / "needles" / f"{length}-{CHARS[length]}" / f"{digest_of('needles.py')}.jsonl"
    if not file.is_file():
        write_needles(file, CHARS[length])
    return file


def _short(recipe: Recipe, cache: Path) -> Recipe:
    """The base's recipe: without the rope, on short documents."""
    data = recipe.data.model_copy(update={"sources": (str(_needles(256, cache)),), "format": "text"})
    model = recipe.model.model_copy(update={"rope_scaling": None})
    return recipe.model_copy(update={"data": data, "model": model})


def _stage(name: str, recipe: Recipe, base: Path, cache: Path) -> ContinuedRecipe:
    """A shipped recipe of extension, with this row's seed and rope, on text with needles."""
    length = read_recipe(ContinuedRecipe, name).train.seq_len
    rope = recipe.model.rope_scaling
    plain = ["context.rope_scaling=0"] if rope is None else []
    overrides = [f"train.seed={recipe.train.seed}", f"cost.project={recipe.cost.project}", *plain]
    overrides += [f"train.precision={recipe.train.precision}"]
    stage = read_recipe(ContinuedRecipe, name, overrides, [str(_needles(length, cache))])
    assert stage.context is not None and stage.context.rope_scaling == rope, "the arm's rope is that of the recipe"
    return stage.model_copy(update={"base": str(base)})


def _measured(model: Transformer, tokenizer: Tokenizer, recipe: Recipe, cache: Path) -> dict[str, float]:
    """recall_T: share of needles that are recalled in documents of T tokens; of the longest also by depth, in quarters.

    bits_from_P: bits a token at positions from P to the next of BINS, of the longest documents.
    """
    measured: dict[str, float] = {}
    for length, count in DOCUMENTS.items():
        found: list[tuple[float, bool]] = []
        nats, tokens = torch.zeros(2, len(BINS) - 1, dtype=torch.float64)
        for document in _heldout(length, recipe, cache)[:count]:
            recalled, losses_T = _asked(model, tokenizer, document.text)
            found += recalled
            for i, (start, stop) in enumerate(zip(BINS, BINS[1:], strict=False)):
                nats[i] += losses_T[start:stop].double().sum()
                tokens[i] += losses_T[start:stop].numel()
        measured[f"recall_{length}"] = statistics.mean(right for _, right in found)
        if length == max(DOCUMENTS):
            for quarter in range(4):
                inside = [right for depth, right in found if quarter <= depth * 4 < quarter + 1]
                measured[f"recall_quarter_{quarter + 1}"] = statistics.mean(inside)
            bits = nats / tokens / math.log(2)
            measured |= {f"bits_from_{start}": float(b) for start, b in zip(BINS, bits, strict=False)}
    return measured


def _heldout(length: int, recipe: Recipe, cache: Path) -> Sequence[Document]:
    data = recipe.data.model_copy(update={"sources": (str(_needles(length, cache)),), "format": "text"})
    base = _base(recipe, cache)
    return prepare(
        data, vocab_size=recipe.model.vocab_size, seq_len=length, seed=recipe.train.seed, cache_dir=cache,
        tokenizer=load(base).tokenizer,
    ).heldout  # fmt: skip


@torch.inference_mode()
def _asked(model: Transformer, tokenizer: Tokenizer, text: str) -> tuple[list[tuple[float, bool]], torch.Tensor]:
    """(depth, whether the model's likeliest tokens are the answer) of each question, and the losses of all tokens."""
    pieces: list[list[int]] = [[] if tokenizer.bos_id is None else [tokenizer.bos_id]]
    spans, end = [], 0
    for start, stop, depth in questions_of(text):
        pieces += [tokenizer.encode(text[end:start]), tokenizer.encode(text[start:stop])]
        at = sum(map(len, pieces[:-1]))
        spans.append((at, at + len(pieces[-1]), depth))
        end = stop
    ids = [token for piece in pieces for token in piece][: model.config.max_position_embeddings]
    hidden_Td = model(torch.tensor(ids, device=model.device)[None]).hidden_BTd[0]
    found = []
    for first, last, depth in spans:
        if last <= len(ids):
            said = model.logits(hidden_Td[first - 1 : last - 1]).argmax(-1).tolist()
            found.append((depth, said == ids[first:last]))
    return found, token_nats(model, [ids])[0]
