"""Answers as tensors, and what a model thinks of their tokens in a training forward.

Shapes: N answers, S tokens of the longest prompt and answer, T of the longest answer, d hidden, Z = vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from baleen.align.rollout import Answer
from baleen.model.transformer import Transformer


class AnswerTokens(NamedTuple):
    """Answers as tensors: rows of prompt and answer, padded at the right."""

    ids_NS: Tensor
    targets_NT: Tensor  # the answers alone; 0 beyond their ends
    places_NT: Tensor  # where each of them stands in its row
    mask_NT: Tensor  # float: 1 on tokens of an answer
    drawn_logprobs_NT: Tensor  # as the engine reported them


def answer_tokens(answers: Sequence[Answer], pad_id: int, device: torch.device) -> AnswerTokens:
    N, T = len(answers), max(len(a.token_ids) for a in answers)
    S = max(len(a.prompt_ids) + len(a.token_ids) for a in answers)
    ids_NS = torch.full((N, S), pad_id)
    targets_NT, places_NT = torch.zeros(N, T, dtype=torch.long), torch.ones(N, T, dtype=torch.long)
    mask_NT, drawn_NT = torch.zeros(N, T), torch.zeros(N, T)
    for row, answer in enumerate(answers):
        prompt, length = len(answer.prompt_ids), len(answer.token_ids)
        ids_NS[row, : prompt + length] = torch.tensor([*answer.prompt_ids, *answer.token_ids])
        targets_NT[row, :length] = torch.tensor(answer.token_ids)
        places_NT[row, :length] = torch.arange(prompt, prompt + length)
        mask_NT[row, :length] = 1.0
        drawn_NT[row, :length] = torch.tensor(answer.logprobs)
    return AnswerTokens(*(tensor.to(device) for tensor in (ids_NS, targets_NT, places_NT, mask_NT, drawn_NT)))


class Scored(NamedTuple):
    logprobs_NT: Tensor  # of the answers' tokens, at the rollout's temperature; 0 beyond their ends
    entropy_NT: Tensor  # of the distribution each was drawn from, without gradient
    own_logprobs_NT: Tensor  # at temperature 1, without gradient: what the engine reports
    loads: list[Tensor]  # tokens per expert, int64 [E], for each MoE layer of the trunk; padding left out


def answer_logprobs(model: Transformer, tokens: AnswerTokens, temperature: float) -> Scored:
    """A training forward over the answers: the log-probability of every token of them."""
    hidden_NSd, routings = model(tokens.ids_NS[:, :-1])
    rows_N1 = torch.arange(len(hidden_NSd), device=hidden_NSd.device)[:, None]
    logits_NTZ = model.logits(hidden_NSd[rows_N1, tokens.places_NT - 1]).float()
    index_NT1 = tokens.targets_NT[..., None]
    all_NTZ = (logits_NTZ / temperature).log_softmax(-1)
    logprobs_NT = all_NTZ.gather(-1, index_NT1)[..., 0] * tokens.mask_NT
    with torch.no_grad():
        entropy_NT = -(all_NTZ.exp() * all_NTZ).sum(-1) * tokens.mask_NT
        own_NT = logprobs_NT
        if temperature != 1.0:
            own_NT = logits_NTZ.log_softmax(-1).gather(-1, index_NT1)[..., 0] * tokens.mask_NT
        last_N1 = tokens.places_NT.max(1, keepdim=True).values
        real_M = (torch.arange(tokens.ids_NS.shape[1] - 1, device=last_N1.device) < last_N1).flatten()
        loads = [r.indices_NK[real_M].flatten().bincount(minlength=r.scores_NE.shape[1]) for r in routings]
    return Scored(logprobs_NT, entropy_NT, own_NT.detach(), loads)


def micro_batches(answers: Sequence[Answer], rows: Sequence[int], tokens: int) -> list[list[int]]:
    """The rows, those of like length together, in parts of at most so many tokens with their padding; one at least."""

    def length(row: int) -> int:
        return len(answers[row].prompt_ids) + len(answers[row].token_ids)

    parts: list[list[int]] = []
    for row in sorted(rows, key=length, reverse=True):
        if not parts or (len(parts[-1]) + 1) * length(parts[-1][0]) > tokens:
            parts.append([])
        parts[-1].append(row)
    return parts


def answers_mask(answers: Sequence[Answer], mask_truncated: bool) -> Tensor:
    """float [N, T]: 1 on an answer's tokens; an answer cut off by length may teach nothing (DAPO's overlong filter)."""
    mask_NT = torch.zeros(len(answers), max(len(answer.token_ids) for answer in answers))
    for row, answer in enumerate(answers):
        if not (mask_truncated and answer.truncated):
            mask_NT[row, : len(answer.token_ids)] = 1.0
    return mask_NT
