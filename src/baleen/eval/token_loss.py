"""The loss of every token by itself.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from baleen.model.transformer import Transformer


@torch.inference_mode()
def token_nats(model: Transformer, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """For each row of token ids: -log p of its tokens from the second on, float32 on the CPU, [length - 1].

    All rows at once: mind the memory of B * T * vocab_size logits.
    """
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long, device=model.device)
    for b, ids in enumerate(rows):
        ids_BT[b, : len(ids)] = torch.tensor(ids, device=model.device)
    logits = model.logits(model(ids_BT[:, :-1]).hidden_BTd).float()
    nats_BT = F.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none").view_as(ids_BT[:, 1:])
    return [nats_BT[b, : len(ids) - 1].cpu() for b, ids in enumerate(rows)]
