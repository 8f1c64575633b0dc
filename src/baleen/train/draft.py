"""The loss of MTP layers that are trained alone: behind a frozen trunk they learn to say what it will say.

A draft is kept if the trunk chooses the same token, so the target at i is not the text's t_{i+k+1} but the trunk's own
distribution over it, which is at hand: h_{i+k} through the output head. The trunk runs once, without gradients.
Shapes: B sequences, T positions, N rows, d hidden, Z = vocab_size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from baleen.model.linear import input_gradients, products
from baleen.model.moe import Gate
from baleen.model.transformer import Transformer
from baleen.parallel.stage import Objective
from baleen.parallel.worker import Alone, MicroBatch, Totals

ROWS_AT_ONCE = 512


class DraftLoss(NamedTuple):
    depths: list[Tensor]  # nats a token of each; the trunk's own entropy is their floor
    agreement: float  # share of positions at which the first layer's choice is the trunk's
    loads: list[Tensor]  # tokens per expert of the MTP layers' gates


def freeze_trunk(model: Transformer) -> None:
    """Only the MTP layers keep their gradients; the embedding and the head that they share do not."""
    model.requires_grad_(False)
    for layer in model.mtp_layers:
        layer.requires_grad_(True)


class Drafting(Alone):
    """One process that trains the MTP layers alone; `agreement` is that of the last step."""

    def __init__(self, model: Transformer):
        super().__init__(model)
        freeze_trunk(model)
        self.agreement = math.nan

    @property
    def gates(self) -> dict[int, Gate]:
        cfg = self.model.config
        trunk = sum(cfg.is_moe_layer(i) for i in range(cfg.num_hidden_layers))
        return dict(enumerate(self.model.gates[trunk:]))

    def accumulate(self, micro_batches: list[MicroBatch], objective: Objective) -> Totals:
        """The mean over depths, and of a depth over its targets, by which micro-batches count."""
        total, agreement, loads = 0.0, 0.0, list[Tensor]()
        for batch in micro_batches:
            assert batch.document_ids is not None, "drafts are told apart by document"
            with objective.computing(self.device):
                loss = draft_loss(self.model, batch.tokens[:, :-1], batch.document_ids[:, :-1], batch.loss_mask)
            shares = batch.shares[2:].tolist()
            mean = torch.stack([depth * share for depth, share in zip(loss.depths, shares, strict=True)]).mean()
            mean.backward()
            total += mean.item()
            agreement += loss.agreement * shares[0]
            loads = [a + b for a, b in zip(loads, loss.loads, strict=True)] if loads else loss.loads
        self.agreement = agreement
        return Totals(total, 0.0, 0.0, loads)

    def tensors(self) -> dict[str, Tensor]:
        """What learns; the rest is in the base."""
        learns = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        held = super().tensors()
        return {n: t for n, t in held.items() if n in learns or n.endswith("e_score_correction_bias")}


def draft_loss(
    model: Transformer, tokens_BT: Tensor, document_ids_BT: Tensor, mask_BT: Tensor | None = None
) -> DraftLoss:
    """Cross-entropy of each MTP layer with the trunk's distribution, on tokens [B, T] of documents told apart.

    mask [B, T + 1]: 0 at tokens whose drafts do not count; None: all do, also where the next document begins, for the
    trunk's word is a word there too.
    """
    with torch.no_grad():
        trunk_BTd = model(tokens_BT, document_ids_BT=document_ids_BT).hidden_BTd
    hidden_BTd, losses, loads, agreed = trunk_BTd, [], [], 0.0
    for depth in range(len(model.mtp_layers)):
        k = depth + 1
        hidden_BTd, routings = model.predict_ahead(
            depth, hidden_BTd[:, :-1], tokens_BT[:, k:], document_ids_BT=document_ids_BT[:, :-k]
        )
        drafts, words = hidden_BTd, trunk_BTd[:, k:]
        if mask_BT is not None:
            counts_BT = mask_BT[:, k + 1 :] != 0
            drafts, words = drafts[counts_BT], words[counts_BT]
        loss, agreement = distilled(drafts, words, model.lm_head.weight)
        losses.append(loss)
        loads += [routing.load() for routing in routings]
        agreed = agreed if depth else float(agreement.detach())
    return DraftLoss(losses, agreed, loads)


def distilled(student: Tensor, teacher: Tensor, weight_Zd: Tensor) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy in nats with the teacher's distribution, share of equal argmax), through one frozen head.

    student, teacher: [..., d]. Logits exist for ROWS_AT_ONCE rows at a time, and their gradient is taken at once.
    """
    dtype = torch.get_autocast_dtype(student.device.type) if torch.is_autocast_enabled(student.device.type) else None
    parts = (student.flatten(0, -2), teacher.detach().flatten(0, -2), weight_Zd.detach())
    student_Nd, teacher_Nd, weight_Zd = (part.to(dtype) if dtype else part for part in parts)
    return _Distilled.apply(student_Nd, teacher_Nd, weight_Zd)  # type: ignore[return-value]


class _Distilled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_Nd: Tensor, teacher_Nd: Tensor, weight_Zd: Tensor) -> tuple[Tensor, Tensor]:
        N = student_Nd.shape[0]
        wide = torch.promote_types(student_Nd.dtype, torch.float32)
        loss, equal = torch.zeros((), dtype=wide, device=student_Nd.device), 0
        gradient_Nd = torch.empty_like(student_Nd)
        for start in range(0, N, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            one_group = [len(student_Nd[rows])]
            wanted = products(teacher_Nd[rows], weight_Zd, one_group).to(wide).softmax(-1)
            said = products(student_Nd[rows], weight_Zd, one_group).to(wide).log_softmax(-1)
            loss -= torch.dot(wanted.flatten(), said.flatten())
            equal += int((wanted.argmax(-1) == said.argmax(-1)).sum())
            gradient = said.exp_().sub_(wanted).div_(N).to(weight_Zd.dtype)
            input_gradients(gradient, weight_Zd, one_group, gradient_Nd[rows])
        ctx.save_for_backward(gradient_Nd)
        return loss / max(1, N), loss.new_tensor(equal / max(1, N))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor):  # type: ignore[override]
        (gradient_Nd,) = ctx.saved_tensors
        return (gradient_Nd.to(grad.dtype) * grad).to(gradient_Nd.dtype), None, None
