"""Which of ten turns came next? A conversation's true next turn among nine from elsewhere, chosen in two ways.

By likelihood; and by gain, which weighs it against what it is after other histories, for plain likelihood prefers
"haha" after everything.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from baleen.config import UserError
from baleen.data.document import Document, Message
from baleen.data.tokenizer import Tokenizer
from baleen.infer.engine import Engine, Request
from baleen.infer.sampler import SamplingParams
from baleen.model.transformer import Transformer

Chat = Sequence[Message]

CANDIDATES = 10
MAX_CANDIDATE_TOKENS = 48
OTHERS = 3  # histories of other conversations that a turn is weighed against
OTHER_TOKENS = 65  # of each, its last ones: whole pages of the engine's cache, which are read once, and one more


class Accuracy(NamedTuple):
    by_gain: float
    by_likelihood: float


def next_turn_accuracy(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    contexts: int,
    window: int,
    seed: int = 0,
) -> Accuracy:
    """Shares of `contexts` held-out places at which the true next turn is chosen.

    A turn's gain is log p(turn | history) less its mean over OTHERS histories of other conversations. The other nine
    are turns of other documents, spoken in the same role. Context and candidate together have at most `window` tokens;
    chance is 1/10. Raises UserError if the documents hold too few conversations.
    """
    engine, rng = Engine(model, None), random.Random(seed)
    others = _other_histories(tokenizer, documents, rng)
    places = _places(documents, contexts, rng)
    scores = [_scores(engine, tokenizer, chat, turn, turns, others, window) for chat, turn, turns in places]
    found = [[_credit(own) for own in pair] for pair in scores]
    by_gain, by_likelihood = (sum(column) / len(found) for column in zip(*found, strict=True))
    return Accuracy(by_gain, by_likelihood)


def _credit(scores: list[float]) -> float:
    """What choosing the best score earns where the first is the true one: 1 or 0; of k that tie, 1/k. None is NaN."""
    assert all(map(math.isfinite, scores)), scores
    best = max(scores)
    return (scores[0] == best) / scores.count(best)


def _places(documents: Sequence[Document], count: int, rng: random.Random) -> Iterator[tuple[Chat, int, list[str]]]:
    """(conversation, place of the turn, candidates with the true one first)."""
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
        yield chat, turn, candidates


def _other_histories(
    tokenizer: Tokenizer, documents: Sequence[Document], rng: random.Random
) -> dict[str, list[tuple[Chat, list[int]]]]:
    """By the role that speaks next: (conversation, the tokens of a history in it), OTHERS + 1 from different ones."""
    histories: dict[str, list[tuple[Chat, list[int]]]] = {"user": [], "assistant": []}
    chats = [document.messages for document in documents if document.messages]
    for chat in rng.sample(chats, len(chats)):
        for role, found in histories.items():
            turns = [turn for turn in range(1, len(chat)) if chat[turn].role == role]
            if turns and len(found) <= OTHERS:
                found.append((chat, tokenizer.encode_chat(chat[: rng.choice(turns)])))
    return histories


def _scores(
    engine: Engine,
    tokenizer: Tokenizer,
    chat: Chat,
    turn: int,
    candidates: list[str],
    others: dict[str, list[tuple[Chat, list[int]]]],
    window: int,
) -> tuple[list[float], list[float]]:
    """Of each candidate its gain, and log p after the history, in nats."""
    history, role = list(chat[:turn]), chat[turn].role
    before = tokenizer.encode_chat(history)
    encoded = [tokenizer.encode_chat([*history, Message(role, text)]) for text in candidates]
    rows = [whole[len(before) :][:MAX_CANDIDATE_TOKENS] for whole in encoded]
    longest = max(len(row) for row in rows)
    own = before[-(window - longest) :]
    engine.complete([Request(own, SamplingParams(max_tokens=1))])  # read once, then shared by the ten
    elsewhere = [ids[-OTHER_TOKENS:] for other, ids in others[role] if other is not chat][:OTHERS]
    after_own, *after_others = _log_likelihoods(engine, [own, *elsewhere], rows)
    gains = [here - sum(there) / len(there) for here, *there in zip(after_own, *after_others, strict=True)]
    return gains, after_own


def _log_likelihoods(engine: Engine, histories: Sequence[list[int]], rows: list[list[int]]) -> list[list[float]]:
    """log p of each row after each history, in nats."""
    requests = [
        Request([*ids, *row], SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=len(ids)))
        for ids in histories
        for row in rows
    ]
    sums = [sum(token.logprob for token in c.prompt_logprobs or ()) for c in engine.complete(requests)]
    return [sums[first : first + len(rows)] for first in range(0, len(sums), len(rows))]
