"""A batch of token sequences growing over one latent cache: prefill, then one forward of the trunk a step.

Shapes: B sequences, T tokens of a forward, D drafts (0 without speculation), S token places, d hidden, Z = vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baleen.infer.sampler import Sampler, SamplingParams, draw
from baleen.infer.speculative import Drafter, verify
from baleen.model.cache import LatentCache
from baleen.model.transformer import Transformer

FIRST_ROOM = 128  # tokens beyond the longest prompt before tokens and cache are first enlarged


class Decoder:
    """The numbers of B sequences; what the tokens mean, and who is finished, is its caller's business.

    tokens_BS holds the known tokens and, after them, drafts; of lengths_B known tokens all but the last are in the
    cache. Speculating, a forward verifies `depth` drafts of the MTP layers beside the last token.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        depth: int = 0,
    ):
        device, dtype = model.device, model.model.norm.weight.dtype
        self.model, self.depth = model, depth
        self.sampler = Sampler(params, device)
        room = max(len(prompt) for prompt in prompts) + FIRST_ROOM
        self.lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.tokens_BS = torch.zeros(len(prompts), room, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            self.tokens_BS[row, : len(prompt)] = torch.as_tensor(prompt)
        self.cache = LatentCache(model.config, len(prompts), room, mtp=depth > 0, dtype=dtype, device=device)
        self.drafter = Drafter(model, depth, self.cache) if depth else None

    @torch.inference_mode()
    def prefill(self) -> list[list[int]]:
        """Run the prompts, padded to the longest (padding lies beyond every query); the first token of each row."""
        hidden_BTd = self.model(self.tokens_BS[:, : int(self.lengths_B.max())], cache=self.cache).hidden_BTd
        rows_B = torch.arange(len(hidden_BTd), device=hidden_BTd.device)
        logits_BZ = self.model.logits(hidden_BTd[rows_B, self.lengths_B - 1])
        if self.drafter is not None:
            self.drafter.observe(hidden_BTd, torch.zeros_like(self.lengths_B))
        probs_BZ = self.sampler.probabilities(logits_BZ[:, None])[:, 0]
        next_B = draw(probs_BZ, self.sampler.uniforms(1)[:, 0])
        self._append(next_B, torch.zeros_like(next_B))
        return next_B[:, None].tolist()

    @torch.inference_mode()
    def step(self) -> list[list[int]]:
        """Draft, verify with one forward, and append: the new tokens of each row, kept drafts and one more."""
        D = self.depth
        self._make_room()
        drafts_BD = self.tokens_BS[:, :0]
        draft_probs_BDZ = torch.empty(len(drafts_BD), 0, self.model.config.vocab_size, device=drafts_BD.device)
        if self.drafter is not None:
            drafts_BD, draft_probs_BDZ = self.drafter.propose(self.tokens_BS, self.lengths_B, self.sampler)
        first_B = self.lengths_B - 1
        positions_BT = first_B[:, None] + torch.arange(D + 1, device=first_B.device)
        hidden_BTd = self.model(
            self.tokens_BS.gather(1, positions_BT), positions_BT=positions_BT, cache=self.cache
        ).hidden_BTd
        target_BTZ = self.sampler.probabilities(self.model.logits(hidden_BTd))
        uniforms = self.sampler.uniforms(D + 1)
        kept_B, next_B = verify(target_BTZ, draft_probs_BDZ.double(), drafts_BD, uniforms[:, :D], uniforms[:, D])
        self._append(next_B, kept_B)
        kept = kept_B.tolist()
        if self.drafter is not None:
            self.drafter.observe(hidden_BTd[:, : max(kept) + 1], first_B)
        new_BT = self.tokens_BS.gather(1, positions_BT + 1).tolist()
        return [tokens[: count + 1] for tokens, count in zip(new_BT, kept, strict=True)]

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order; the others' cache is freed."""
        index = torch.tensor(rows, dtype=torch.long, device=self.lengths_B.device)
        self.tokens_BS, self.lengths_B = self.tokens_BS[index], self.lengths_B[index]
        self.sampler.select(rows)
        self.cache.select(index)
        if self.drafter is not None:
            self.drafter.select(index)

    def _append(self, next_B: Tensor, kept_B: Tensor) -> None:
        """Make `kept_B` drafts known, and the token after them."""
        self.lengths_B = self.lengths_B + kept_B
        self.tokens_BS.scatter_(1, self.lengths_B[:, None], next_B[:, None])
        self.lengths_B = self.lengths_B + 1

    def _make_room(self) -> None:
        needed = int(self.lengths_B.max()) + self.depth + 1
        if needed > self.tokens_BS.shape[1]:
            grown = self.tokens_BS.new_zeros(len(self.tokens_BS), 2 * needed)
            grown[:, : self.tokens_BS.shape[1]] = self.tokens_BS
            self.tokens_BS = grown
