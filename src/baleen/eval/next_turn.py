"""Which of ten turns came next? A conversation's true next turn among nine from elsewhere, chosen by likelihood.

The likelihood is weighed against the turn's own without a history: plain likelihood prefers "haha" after everything.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from baleen.config import UserError
from baleen.data.document import Document, Message
from baleen.data.tokenizer import Tokenizer
from baleen.infer.engine import Engine, Request
from baleen.infer.sampler import SamplingParams
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
    engine = Engine(model, None)
    places = _places(documents, contexts, random.Random(seed))
    scores = [_scores(engine, tokenizer, history, turns, window) for history, turns in places]
    return sum(own.index(max(own)) == 0 for own in scores) / len(scores)


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


def _scores(engine: Engine, tokenizer: Tokenizer, history: list[Message], turns: list[str], window: int) -> list[float]:
    """How much likelier the history makes each turn: log p(turn | history) - log p(turn | no history)."""
    role = "user" if history[-1].role == "assistant" else "assistant"
    before = tokenizer.encode_chat(history)
    rows = []
    for turn in turns:
        whole = tokenizer.encode_chat([*history, Message(role, turn)])
        rows.append(whole[len(before) :][:MAX_CANDIDATE_TOKENS])
    longest = max(len(row) for row in rows)
    with_history = _log_likelihoods(engine, before[-(window - longest) :], rows)
    return [a - b for a, b in zip(with_history, _log_likelihoods(engine, before[:1], rows), strict=True)]


def _log_likelihoods(engine: Engine, before: list[int], rows: list[list[int]]) -> list[float]:
    """log p of each row after `before`, in nats."""
    score = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=len(before))
    completions = engine.complete([Request([*before, *row], score) for row in rows])
    return [sum(token.logprob for token in completion.prompt_logprobs or ()) for completion in completions]
