"""Which of ten turns came next? A conversation's true next turn among nine from elsewhere, chosen by likelihood.

The likelihood is weighed against the turn's own without a history: plain likelihood prefers "haha" after everything.

Shapes: K candidates, T tokens of a candidate.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from baleen.config import UserError
from baleen.data.document import Document, Message
from baleen.data.tokenizer import Tokenizer
from baleen.model.cache import LatentCache
from baleen.model.transformer import Transformer

CANDIDATES = 10
MAX_CANDIDATE_TOKENS = 48


def next_turn_accuracy(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    contexts: int,
    window: int,
    seed: int = 0,
) -> float:
    """Share of `contexts` held-out places at which the history makes the true next turn gain the most likelihood.

    The other nine are turns of other documents, spoken in the same role. Context and candidate together have at most
    `window` tokens; chance is 1/10. Raises UserError if the documents hold too few conversations.
    """
    right = [
        _scores(model, tokenizer, history, turns, window).argmax().item() == 0
        for history, turns in _places(documents, contexts, random.Random(seed))
    ]
    return sum(right) / len(right)


def _places(documents: Sequence[Document], count: int, rng: random.Random) -> Iterator[tuple[list[Message], list[str]]]:
    """(history, candidates with the true one first)."""
    chats = [document.messages for document in documents if document.messages and len(document.messages) > 1]
    if len(chats) < 2:
        raise UserError("next-turn accuracy needs two held-out conversations or more: raise data.heldout_fraction")
    if min(len({m.content for c in chats for m in c if m.role == role}) for role in ("user", "assistant")) < 32:
        raise UserError("the held-out conversations have too few different turns: raise data.heldout_fraction")
    for _ in range(count):
        chat = rng.choice(chats)
        turn = rng.randrange(1, len(chat))
        candidates = [chat[turn].content]
        while len(candidates) < CANDIDATES:
            other = rng.choice(rng.choice(chats))
            if other not in chat and other.role == chat[turn].role and other.content not in candidates:
                candidates.append(other.content)
        yield list(chat[:turn]), candidates


@torch.inference_mode()
def _scores(model: Transformer, tokenizer: Tokenizer, history: list[Message], turns: list[str], window: int) -> Tensor:
    """How much likelier the history makes each turn, [K]: log p(turn | history) - log p(turn | no history)."""
    role = "user" if history[-1].role == "assistant" else "assistant"
    before = tokenizer.encode_chat(history)
    rows = []
    for turn in turns:
        whole = tokenizer.encode_chat([*history, Message(role, turn)])
        rows.append(whole[len(before) :][:MAX_CANDIDATE_TOKENS])
    longest = max(len(row) for row in rows)
    return _log_likelihoods(model, before[-(window - longest) :], rows) - _log_likelihoods(model, before[:1], rows)


def _log_likelihoods(model: Transformer, before: list[int], rows: list[list[int]]) -> Tensor:
    """log p of each row after `before`, [K], in nats. `before` is read once, into a cache that all rows share."""
    longest = max(len(row) for row in rows)
    ids_KT = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
    valid_KT = torch.tensor([[t < len(row) for t in range(longest)] for row in rows], device=model.device)
    dtype = next(model.parameters()).dtype
    cache = LatentCache(model.config, 1, len(before) + longest, dtype=dtype, device=model.device)
    positions = torch.arange(len(before) + longest, device=model.device)
    past = torch.tensor([before], device=model.device)
    last = model(past, positions_BT=positions[None, : len(before)], cache=cache).hidden_BTd[:, -1:]
    cache.select(torch.zeros(len(rows), dtype=torch.long, device=model.device))
    hidden = model(ids_KT, positions_BT=positions[len(before) :].expand_as(ids_KT), cache=cache).hidden_BTd
    hidden = torch.cat((last.expand(len(rows), -1, -1), hidden[:, :-1]), 1)
    log_probs = model.logits(hidden).log_softmax(-1).gather(-1, ids_KT[..., None])[..., 0]
    return (log_probs * valid_KT).sum(1)
