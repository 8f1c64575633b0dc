"""A trained run as the benchmarks of answers and formats take it: model, held-out documents, and how texts repeat."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from baleen.data.document import Document
from baleen.data.prepare import prepare
from baleen.data.tokenizer import Tokenizer
from baleen.interop.load import load
from baleen.model.transformer import Transformer
from baleen.recipe import Recipe, read_recipe
from baleen.train.continued_recipe import ContinuedRecipe

GRAM = 4


class Trained(NamedTuple):
    model: Transformer
    tokenizer: Tokenizer
    heldout: list[Document]
    seq_len: int  # it was trained on


def trained(run: Path) -> Trained:
    """The run of a recipe, or of one that went on from a model there was."""
    path = run / "recipe.toml"
    has_base = path.exists() and "base" in tomllib.loads(path.read_text())
    recipe = read_recipe(ContinuedRecipe if has_base else Recipe, path)
    model, tokenizer, _ = load(run)
    train = recipe.train
    prepared = prepare(
        recipe.data,
        vocab_size=model.config.vocab_size,
        seq_len=train.seq_len,
        seed=train.seed,
        cache_dir=run / "data",
        tokenizer=tokenizer if has_base else None,  # a run of its own has trained it on the same text
    )
    return Trained(model, tokenizer, prepared.heldout, train.seq_len)


def repetition(answers: Sequence[Sequence[int]]) -> float:
    """Share of the 4-grams of an answer that stood in it before: loops are easy to draft."""
    counts = [Counter(tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)) for ids in answers]
    total = sum(sum(count.values()) for count in counts)
    return 1 - sum(map(len, counts)) / total if total else 0.0
