"""Speculative decoding by multi-token prediction (arXiv 2412.19437 §2.2 and §5.4.3), without loss.

The MTP layers draft the tokens that come next, one forward of the trunk verifies them all. Draft and trunk draw with
the same noise (see sampler.py), and a draft is kept if it is what the trunk draws: so an answer is, token for token,
the one that would have come without drafts, at every temperature, and what the MTP layers hold in the cache can make
it slower but not different (arXiv 2408.07978; rejection sampling, arXiv 2211.17192, keeps somewhat more drafts but
makes an answer depend on them).

Shapes: N tokens of all windows, d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baleen.infer.runner import Runner
from baleen.infer.sampler import Place, choose
from baleen.model.cache import Batch


@dataclass
class Window:
    """The positions of one sequence that the trunk has just read: `count` from `start` on.

    `place`: that of the first draft, if `wanted` drafts are to follow the tokens; then the window ends at the last but
    one of them.
    """

    tokens: Sequence[int]  # all that are known
    start: int
    row: int  # of the first position, among the trunk's hidden states
    count: int
    pages: Sequence[int]
    place: Place | None = None
    wanted: int = 0
    tail_Td: Tensor | None = None  # the trunk's hidden states just before the window
    drafts: list[int] = field(default_factory=list)


class Drafter:
    """Chains the MTP layers over the newest tokens and keeps their rows of the cache.

    With n tokens known, layer k has row i from h^{k-1}_i and t_{i+k}, and drafts t_{n-1+k} at i = n - 2. Its rows from
    i = n - k on rest on drafts: so with layers beyond the first a window is begun as many positions earlier.
    """

    def __init__(self, runner: Runner, depth: int):
        assert depth >= 1
        self.runner, self.depth = runner, depth

    def propose(self, hidden_Nd: Tensor, windows: Sequence[Window]) -> None:
        """Read the windows; fill the `drafts` of those that want any, and every `tail_Td` for the window that follows.

        hidden_Nd: the trunk's hidden states that the windows point into.
        """
        windows = sorted(windows, key=lambda w: w.count)
        x_Nd = self._gather(hidden_Nd, windows)
        starts = [w.start - (0 if w.tail_Td is None else len(w.tail_Td)) for w in windows]
        counts = [w.start + w.count - start for w, start in zip(windows, starts, strict=True)]
        self._keep_tails(x_Nd, windows, counts)
        for k in range(1, self.depth + 1):
            known = [len(w.tokens) + len(w.drafts) for w in windows]
            readable = [max(0, min(c, n - k - s)) for c, n, s in zip(counts, known, starts, strict=True)]
            readable = [n if w.place is None or w.wanted >= k else 0 for n, w in zip(readable, windows, strict=True)]
            if not any(readable):
                return
            if readable != counts:
                pieces = x_Nd.split(counts)
                x_Nd = torch.cat([piece[:n] for piece, n in zip(pieces, readable, strict=True)])
                pairs = [(w, s, n) for w, s, n in zip(windows, starts, readable, strict=True) if n]
                windows, starts, counts = map(list, zip(*pairs, strict=True))
            tokens = [
                id
                for w, s, n in zip(windows, starts, counts, strict=True)
                for id in _piece(w.tokens, w.drafts, s + k, n)
            ]
            x_Nd = self.runner.draft(k - 1, x_Nd, Batch(tokens, starts, counts, [w.pages for w in windows]))
            self._draw(x_Nd, windows, counts, k)

    def _draw(self, x_Nd: Tensor, windows: Sequence[Window], counts: Sequence[int], k: int) -> None:
        ends = torch.tensor(counts).cumsum(0).tolist()
        drawing = [(w, end - 1) for w, end in zip(windows, ends, strict=True) if w.place is not None]
        if not drawing:
            return
        last_Bd = x_Nd if len(drawing) == len(x_Nd) else x_Nd[[row for _, row in drawing]]
        places = [w.place._replace(index=w.place.index + k - 1) for w, _ in drawing if w.place is not None]
        chosen = choose(self.runner.logits(last_Bd), places).tolist()
        for (w, _), id in zip(drawing, chosen, strict=True):
            w.drafts.append(id)

    def _gather(self, hidden_Nd: Tensor, windows: Sequence[Window]) -> Tensor:
        if any(w.tail_Td is not None for w in windows):
            parts = [(w.tail_Td, hidden_Nd[w.row : w.row + w.count]) for w in windows]
            return torch.cat([part for pair in parts for part in pair if part is not None])
        rows = [row for w in windows for row in range(w.row, w.row + w.count)]
        return hidden_Nd if rows == list(range(len(hidden_Nd))) else hidden_Nd[rows]

    def _keep_tails(self, x_Nd: Tensor, windows: Sequence[Window], counts: Sequence[int]) -> None:
        if self.depth > 1:
            for w, rows_Td in zip(windows, x_Nd.split(list(counts)), strict=True):
                w.tail_Td = rows_Td[-(self.depth - 1) :]


def _piece(tokens: Sequence[int], drafts: Sequence[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start` on of the known ones and the drafts behind them."""
    if start + count <= len(tokens):
        return list(tokens[start : start + count])
    return [*tokens[start:], *drafts][:count] if start < len(tokens) else list(drafts[start - len(tokens) :][:count])


class Payoff:
    """Whether drafting pays, by the clock: tokens a second with drafts against without, for each size of batch.

    Sizes are told apart by powers of two. Both ways are tried first, in TRIAL steps each; later the slower one again in
    so many of every PERIOD, since acceptance changes with the text. Answers do not depend on it.
    """

    TRIAL, PERIOD, MEMORY = 6, 150, 0.98

    def __init__(self) -> None:
        self._tallies: dict[int, _Tally] = {}

    def drafts(self, rows: int) -> bool:
        """Whether a step that moves `rows` answers on should draft for the next."""
        tally = self._tally(rows)
        turn = tally.steps % self.PERIOD
        if tally.steps < 2 * self.TRIAL:
            return tally.steps < self.TRIAL
        faster = tally.rate(True) >= tally.rate(False)
        return faster if turn >= self.TRIAL else not faster

    def observe(self, rows: int, drafted: bool, tokens: int, seconds: float) -> None:
        """A step without prompts: whether it drafted, and the tokens it brought, verified drafts included."""
        tally = self._tally(rows)
        tally.steps += 1
        if drafted == tally.last:  # a step after a change verifies what it did not pay for, or pays for the next
            tally.tokens[drafted] = tally.tokens[drafted] * self.MEMORY + tokens
            tally.seconds[drafted] = tally.seconds[drafted] * self.MEMORY + seconds
        tally.last = drafted

    def _tally(self, rows: int) -> _Tally:
        return self._tallies.setdefault(rows.bit_length(), _Tally())


@dataclass
class _Tally:
    steps: int = 0
    last: bool | None = None
    tokens: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    seconds: dict[bool, float] = field(default_factory=lambda: {False: 1e-9, True: 1e-9})

    def rate(self, drafted: bool) -> float:
        return self.tokens[drafted] / self.seconds[drafted]
