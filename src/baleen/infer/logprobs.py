"""Log-probabilities of given tokens and of the likeliest, for all places at once.

Shapes: M places, Z = vocab_size, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baleen.config import UserError
from baleen.infer.request import Logprob


def require_numbers(values_M: Tensor) -> None:
    """Raises UserError where what a model says of its tokens is NaN."""
    if values_M.isnan().any():
        raise UserError(
            "the model's logits are no numbers: its weights are damaged, or too large for the format it runs in; "
            "fetch or train it again, or run it in fp32"
        )


def logprobs_of(logits_MZ: Tensor, ids: Sequence[int], tops: Sequence[int]) -> list[Logprob]:
    """Of token `ids[m]` at place m, with its `tops[m]` likeliest tokens. Raises UserError where they are no numbers."""
    if not ids:
        return []
    log_probs_MZ = logits_MZ.to(torch.promote_types(logits_MZ.dtype, torch.float32)).log_softmax(-1)
    chosen_M = log_probs_MZ.gather(1, torch.tensor(ids, device=logits_MZ.device)[:, None])[:, 0]
    require_numbers(chosen_M)
    chosen = chosen_M.tolist()
    if not any(tops):
        return [Logprob(id, logprob, ()) for id, logprob in zip(ids, chosen, strict=True)]
    values_MK, ids_MK = log_probs_MZ.topk(min(max(tops), logits_MZ.shape[1]))
    likeliest = [
        tuple(zip(best[:top], values[:top], strict=True))
        for best, values, top in zip(ids_MK.tolist(), values_MK.tolist(), tops, strict=True)
    ]
    return [Logprob(*parts) for parts in zip(ids, chosen, likeliest, strict=True)]
