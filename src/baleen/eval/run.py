"""`baleen eval RUN`: what a saved model makes of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from baleen.config import UserError, load_recipe
from baleen.data.corpus import read_documents
from baleen.data.document import Document
from baleen.data.prepare import prepare
from baleen.eval.bits_per_byte import bits_per_byte
from baleen.interop.load import load


def evaluate_run(
    run: Path, texts: Sequence[Path] = (), account: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> dict[str, Any]:
    """{bits_per_byte, bytes, tokens} of `texts`, or of the text that the run held out.

    `account` opens the ledger's stage, once the input is known to be good: what is refused costs nothing.
    Raises UserError if the run has no recipe to find its held-out text by and no texts are given.
    """
    loaded = load(run)
    window = loaded.model.config.max_position_embeddings
    documents: list[Document]
    if texts:
        documents = list(read_documents([str(text) for text in texts], "text"))
    elif (run / "recipe.toml").is_file():
        recipe = load_recipe(run / "recipe.toml")
        window = recipe.train.seq_len
        documents = prepare(
            recipe.data,
            vocab_size=recipe.model.vocab_size,
            seq_len=window,
            seed=recipe.train.seed,
            cache_dir=run / "data",
        ).heldout
    else:
        raise UserError(f"{run} is a model without a recipe, so it has no held-out text: name a file with --text")
    with account():
        measured = bits_per_byte(loaded.model, loaded.tokenizer, documents, window=window)
    return {"run": str(run), **measured}
