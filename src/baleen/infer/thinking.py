"""A budget for thinking: after so many tokens the thought is closed, and the model must answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baleen.config import UserError
from baleen.data.tokenizer import Tokenizer


class ThinkingBudget:
    """A constraint of sampling: `</think>` is the only token that may follow `budget` tokens of thought, and no second
    thought may follow the first.

    opened: the prompt itself ends in `<think>`. Raises UserError if the tokenizer has no thinking tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, budget: int, *, opened: bool = False):
        begin, end = tokenizer.id_of("<think>"), tokenizer.id_of("</think>")
        if begin is None or end is None:
            raise UserError("this model has no <think> and </think>: its thinking cannot be bounded")
        if budget < 0:
            raise UserError(f"the thinking budget is {budget}: take a number of tokens, 0 or more")
        self._begin, self._end, self._budget, self._opened = begin, end, budget, opened
        self._only_end = torch.zeros(vocab_size, dtype=torch.bool)
        self._only_end[end] = True
        self._no_thought = torch.ones(vocab_size, dtype=torch.bool)
        self._no_thought[begin] = False

    def allowed(self, answer_ids: Sequence[int]) -> Tensor | None:
        """Which tokens may come next, bool [Z]; None: all."""
        if self._end in answer_ids:
            return self._no_thought
        if self._begin in answer_ids:
            thought = len(answer_ids) - 1 - list(answer_ids).index(self._begin)
        elif self._opened:
            thought = len(answer_ids)
        else:
            return None
        return self._only_end if thought >= self._budget else None
