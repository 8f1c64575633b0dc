"""How likely a model finds a continuation, and whether it would say it itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from baleen.infer.engine import Engine, Request
from baleen.infer.sampler import SamplingParams


class Likelihood(NamedTuple):
    log_likelihood: float  # nats, of all its tokens
    greedy: bool  # each is the likeliest where it stands
    tokens: int


def likelihoods(engine: Engine, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
    """Of each continuation after its beginning, both token ids, all at once; beginnings that are equal are read once.

    What does not fit the engine's context is cut from the left; of a beginning at least one token stays. Neither may
    be empty.
    """
    requests = []
    for beginning, continuation in pairs:
        assert beginning and continuation
        kept = [*beginning, *continuation][-engine.context :]
        first = max(1, len(kept) - len(continuation))
        requests.append(Request(kept, SamplingParams(max_tokens=0, prompt_logprobs=1, prompt_logprobs_from=first)))
    found = []
    for completion in engine.complete(requests):
        of_tokens = completion.prompt_logprobs or ()
        greedy = all(token.top[0][0] == token.token_id for token in of_tokens)
        found.append(Likelihood(sum(token.logprob for token in of_tokens), greedy, len(of_tokens)))
    return found
