"""How often the first MTP layer guesses the second token right: on the model's own text, and on people's.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baleen.config import UserError
from baleen.infer.engine import Engine, Request
from baleen.infer.sampler import SamplingParams
from baleen.model.transformer import Transformer


def mtp_acceptance(model: Transformer, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
    """Share of the first drafts (the second tokens of V3 §5.4.3) that greedy speculative decoding keeps.

    Each prompt (token ids) is continued until the model's end token or `max_tokens`; what the model then repeats
    counts too, so look at the text beside the number. Raises UserError without an MTP layer or without room for a
    draft: a prompt must leave `max_tokens` of the context, and the answers must not all end with their first tokens.
    """
    _check_mtp(model)
    context = model.config.max_position_embeddings
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not all(prompts) or longest + max_tokens > context:
        raise UserError(
            f"acceptance wants prompts of 1 to {context - max_tokens} tokens (a context of {context} less max_tokens = "
            f"{max_tokens}); the longest has {longest}, and none may be empty"
        )
    greedy = SamplingParams(temperature=0, max_tokens=max_tokens)
    generation = Engine(model, None).generate([Request(prompt, greedy) for prompt in prompts], speculate=1)
    for _ in generation:
        pass
    (drafted,), (accepted,) = generation.stats.drafted, generation.stats.accepted
    if not drafted:
        raise UserError(
            f"nothing was drafted: {len(prompts)} answers ended with their first tokens; give more prompts, or room "
            "for more tokens"
        )
    return accepted / drafted


@torch.inference_mode()
def mtp_acceptance_forced(model: Transformer, tokens: Tensor, batch_size: int = 8) -> float:
    """The same on given text: share of positions i at which draft and trunk choose the same token for t_{i+2}.

    The draft is the argmax of MTP layer 1 at i, the trunk's choice its argmax at i + 1; both see the true tokens up to
    t_{i+1}. What the text itself has at i + 2 plays no part, and no loop of the model's own can inflate the number.
    tokens: int64 [B, T] with T >= 2, each row on its own; B * (T - 1) positions are counted, `batch_size` rows at once.
    """
    _check_mtp(model)
    assert tokens.ndim == 2 and tokens.shape[0] >= 1 and tokens.shape[1] >= 2, tokens.shape
    agreed = 0
    for rows_BT in tokens.split(batch_size):
        rows_BT = rows_BT.to(model.device)
        hidden_BTd = model(rows_BT).hidden_BTd
        ahead_BTd = model.predict_ahead(0, hidden_BTd[:, :-1], rows_BT[:, 1:]).hidden_BTd
        chosen_BT = model.logits(hidden_BTd[:, 1:]).argmax(-1)
        agreed += int((model.logits(ahead_BTd).argmax(-1) == chosen_BT).sum())
    return agreed / tokens[:, 1:].numel()


def _check_mtp(model: Transformer) -> None:
    if not model.mtp_layers:
        raise UserError("the model has no MTP layer: train it with num_nextn_predict_layers = 1 or more")
