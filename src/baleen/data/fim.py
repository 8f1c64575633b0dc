"""Fill in the middle: prefix-suffix-middle order, at document level, before packing (V3 §4.1, arXiv 2207.14255)."""

from __future__ import annotations

import numpy as np

from baleen.config import UserError
from baleen.data.tokenizer import Tokenizer


def cut_for_fim(text: str, rate: float, rng: np.random.Generator) -> tuple[str, str, str] | None:
    """(prefix, middle, suffix) of a share `rate` of the texts, None for the others.

    The two cuts are uniform over characters, not tokens: a reader's cursor stands inside words too.
    """
    if rate == 0.0 or rng.random() >= rate:
        return None
    first, second = sorted(int(cut) for cut in rng.integers(0, len(text) + 1, size=2))
    return text[:first], text[first:second], text[second:]


def fim_tokens(prefix: list[int], middle: list[int], suffix: list[int], tokenizer: Tokenizer) -> list[int]:
    """`<|fim_begin|>prefix<|fim_hole|>suffix<|fim_end|>middle`, without the document's own bos and eos."""
    begin = tokenizer.id_of("<|fim_begin|>", "<｜fim▁begin｜>")
    hole = tokenizer.id_of("<|fim_hole|>", "<｜fim▁hole｜>")
    end = tokenizer.id_of("<|fim_end|>", "<｜fim▁end｜>")
    if begin is None or hole is None or end is None:
        raise UserError("data.fim_rate is above 0, but the tokenizer has no FIM tokens: set data.fim_rate to 0")
    return [begin, *prefix, hole, *suffix, end, *middle]
