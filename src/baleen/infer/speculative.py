"""Speculative decoding by multi-token prediction (arXiv 2412.19437 §2.2 and §5.4.3), without loss.

The MTP layers draft D tokens, one forward of the trunk verifies them all, and what is kept follows the trunk's own
distribution exactly (Leviathan et al., arXiv 2211.17192, Algorithm 1). Greedy decoding is the case of distributions
with all weight on one token: a draft is kept if it is the trunk's own choice.

Shapes: B sequences, D drafts, T tokens of a window, S token places, d hidden, Z = vocab_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from baleen.infer.sampler import Sampler, draw
from baleen.model.cache import LatentCache
from baleen.model.transformer import Transformer


def verify(
    target_BKZ: Tensor, draft_BDZ: Tensor, drafts_BD: Tensor, accept_BD: Tensor, final_B: Tensor
) -> tuple[Tensor, Tensor]:
    """How many drafts are kept, and the token after them: (int64 [B], int64 [B]).

    target_BKZ: the trunk's distributions at the D places of the drafts and the one after, K = D + 1. draft_BDZ: those
    the drafts were drawn from. accept_BD, final_B: uniform in [0, 1). Draft x is kept with probability
    min(1, p(x) / q(x)); at the first that is not, the token comes from max(0, p - q), renormalised; after the last
    place from p.
    """
    B, D = drafts_BD.shape
    p_BD = target_BKZ[:, :D].gather(-1, drafts_BD[..., None]).squeeze(-1)
    q_BD = draft_BDZ.gather(-1, drafts_BD[..., None]).squeeze(-1)
    kept_B = (accept_BD * q_BD < p_BD).long().cumprod(-1).sum(-1)
    rows_B = torch.arange(B, device=kept_B.device)
    p_BZ = target_BKZ[rows_B, kept_B]
    q_BZ = F.pad(draft_BDZ, (0, 0, 0, 1))[rows_B, kept_B]  # nothing was drafted at the last place
    residual_BZ = (p_BZ - q_BZ).clamp(min=0)
    # p = q up to rounding can leave no residual, where a draft is refused by rounding too.
    empty_B1 = residual_BZ.sum(-1, keepdim=True) == 0
    return kept_B, draw(torch.where(empty_B1, p_BZ, residual_BZ), final_B)


class Drafter:
    """Chains the MTP layers over the newest tokens and keeps their rows of the cache true.

    With n tokens known, layer k has row i from h^{k-1}_i and t_{i+k}, and drafts t_{n-1+k} at i = n - 2. Its rows from
    i = n - k on rest on drafts: the next time it starts there again, and so no rejected draft leaves a trace. The one
    input it then needs from before its predecessor's window, h^{k-1}_{n-k}, is carried over.
    """

    def __init__(self, model: Transformer, depth: int, cache: LatentCache):
        assert 1 <= depth <= len(model.mtp_layers)
        self.model, self.depth, self._cache = model, depth, cache
        self._window_BTd = torch.empty(0)
        self._first_B = torch.empty(0)
        self._carried: list[Tensor] = []  # h^k [B, d] for k = 1 .. depth - 1

    def observe(self, hidden_BTd: Tensor, first_B: Tensor) -> None:
        """The trunk's hidden states from position first_B on, of all tokens that it has seen since the last call."""
        self._window_BTd, self._first_B = hidden_BTd, first_B
        if not self._carried:
            self._carried = [hidden_BTd[:, 0] for _ in range(self.depth - 1)]  # not read: the first window starts at 0

    def propose(self, tokens_BS: Tensor, lengths_B: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor]:
        """Draft D tokens after the `lengths_B` known ones and write them to `tokens_BS`.

        Every known token but the last must have been observed. Returns drafts [B, D] and the distributions they were
        drawn from [B, D, Z].
        """
        uniforms_BD = sampler.uniforms(self.depth)
        window_BTd, first_B = self._window_BTd, self._first_B
        probs: list[Tensor] = []
        carried: list[Tensor] = []
        for k in range(1, self.depth + 1):
            if k > 1:
                window_BTd, first_B = _extended(window_BTd, first_B, self._carried[k - 2])
            positions_BT = first_B[:, None] + torch.arange(window_BTd.shape[1], device=first_B.device)
            ids_BT = tokens_BS.gather(1, (positions_BT + k).clamp(max=tokens_BS.shape[1] - 1))
            window_BTd = self.model.predict_ahead(
                k - 1, window_BTd, ids_BT, positions_BT=positions_BT, cache=self._cache
            ).hidden_BTd
            logits_BZ = self.model.logits(_at(window_BTd, lengths_B - 2 - first_B))
            probs.append(sampler.probabilities(logits_BZ[:, None]).squeeze(1))
            drafted_B = draw(probs[-1], uniforms_BD[:, k - 1])
            tokens_BS.scatter_(1, (lengths_B - 1 + k)[:, None], drafted_B[:, None])
            if k < self.depth:
                carried.append(_at(window_BTd, (lengths_B - 1 - k - first_B).clamp(min=0)))
        self._carried = carried
        places_BD = lengths_B[:, None] + torch.arange(self.depth, device=lengths_B.device)
        return tokens_BS.gather(1, places_BD), torch.stack(probs, 1)

    def select(self, rows: Tensor) -> None:
        """Keep only these sequences, in this order."""
        self._window_BTd, self._first_B = self._window_BTd[rows], self._first_B[rows]
        self._carried = [carried_Bd[rows] for carried_Bd in self._carried]


def _extended(window_BTd: Tensor, first_B: Tensor, carried_Bd: Tensor) -> tuple[Tensor, Tensor]:
    """The window from one position earlier, but not before 0, with the carried state in front.

    One wider for all rows: where it can't begin earlier, the last place repeats, beyond all known tokens.
    """
    B, T, d = window_BTd.shape
    joined_BTd = torch.cat((carried_Bd[:, None], window_BTd), 1)
    start_B1 = (first_B == 0).long()[:, None]
    index_BT = (start_B1 + torch.arange(T + 1, device=first_B.device)).clamp(max=T)
    return joined_BTd.gather(1, index_BT[..., None].expand(B, T + 1, d)), (first_B - 1).clamp(min=0)


def _at(window_BTd: Tensor, index_B: Tensor) -> Tensor:
    """[B, T, d] at one place a row -> [B, d]."""
    return window_BTd[torch.arange(len(index_B), device=index_B.device), index_B]
