"""The loss of V3: cross-entropy of the next token, of the MTP layers (Eq. 24-25), and the sequence-wise balance loss.

Shapes: B sequences, T positions, N = B * T, d hidden, Z = vocab_size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from baleen.config import ModelConfig
from baleen.model.fused import IGNORED, cross_entropy_
from baleen.model.linear import Linear, input_gradients, products, weight_gradients
from baleen.model.moe import Routing, sequence_balance_loss
from baleen.model.transformer import Output, Transformer
from baleen.train.precision import Precision, computing_in

ROWS_AT_ONCE = 1024


class PredictsAhead(Protocol):
    """What is needed behind the trunk: a Transformer, or the last stage of one that is cut into a pipeline."""

    config: ModelConfig
    lm_head: Linear

    def predict_ahead(
        self, depth: int, hidden_BTd: Tensor, next_ids_BT: Tensor, *, document_ids_BT: Tensor | None
    ) -> Output: ...


class Loss(NamedTuple):
    """Of one batch; of a micro-batch, its part of the step's, so that those of all add up."""

    total: Tensor
    main: Tensor  # nats a token
    mtp: Tensor  # mean over depths; 0 without MTP
    balance: Tensor
    loads: list[Tensor]  # tokens per expert, int64 [E], for each of model.gates


def training_loss(
    model: Transformer,
    tokens: Tensor,
    *,
    mtp_loss_weight: float,
    balance_loss_weight: float,
    document_ids: Tensor | None = None,
    loss_mask: Tensor | None = None,
    shares: Tensor | None = None,
) -> Loss:
    """Loss of tokens [B, T + 1]: the first T are the input of the trunk, the last T its targets.

    MTP layer k reads h^{k-1}_i with t_{i+k} and predicts t_{i+k+1}; the last k positions have no such target.
    document_ids [B, T + 1]: attention stays within a document. loss_mask [B, T + 1]: 0 where a token is not learnt.
    shares: of a step of several micro-batches (see MicroBatch); each term is this one's part of the step's.
    """
    T = tokens.shape[1] - 1
    documents = None if document_ids is None else document_ids[:, :T]
    hidden, routings = model(tokens[:, :T], document_ids_BT=documents)
    weights = {"mtp_loss_weight": mtp_loss_weight, "balance_loss_weight": balance_loss_weight}
    return prediction_loss(
        model, hidden, routings, tokens, document_ids=document_ids, loss_mask=loss_mask, shares=shares, **weights
    )


def prediction_loss(
    model: PredictsAhead,
    hidden: Tensor,
    routings: list[Routing],
    tokens: Tensor,
    *,
    mtp_loss_weight: float,
    balance_loss_weight: float,
    document_ids: Tensor | None,
    loss_mask: Tensor | None,
    shares: Tensor | None,
) -> Loss:
    """The part of `training_loss` behind the trunk, whose output is hidden [B, T, d]."""
    targets = tokens if loss_mask is None else tokens.masked_fill(loss_mask == 0, IGNORED)
    T, head = tokens.shape[1] - 1, model.lm_head.weight
    all_learnt = loss_mask is None
    main = cross_entropy(hidden, head, targets[:, 1:], all_learnt=all_learnt)
    shares = main.new_ones(2 + model.config.num_nextn_predict_layers) if shares is None else shares.to(main)
    main = main * shares[0]
    mtp = main.new_zeros(())
    depth = model.config.num_nextn_predict_layers if mtp_loss_weight else 0
    for k in range(1, depth + 1):
        # Row i joins h_i with t_{i+k}: it has read the document of t_i, so no row of another may see it.
        documents = None if document_ids is None else document_ids[:, : T - k]
        output = model.predict_ahead(k - 1, hidden[:, :-1], tokens[:, k:T], document_ids_BT=documents)
        hidden = output.hidden_BTd
        routings = routings + output.routings
        # A mean over this depth's own targets, where Eq. 24 divides their sum by T.
        mtp = mtp + cross_entropy(hidden, head, targets[:, k + 1 :], all_learnt=all_learnt) * shares[1 + k] / depth
    counted = routings if balance_loss_weight else []
    balances = [sequence_balance_loss(r, tokens.shape[0], model.config.num_experts_per_tok) for r in counted]
    balance = torch.stack(balances).sum() * shares[1] if balances else 0 * main
    total = main + mtp_loss_weight * mtp + balance_loss_weight * balance
    return Loss(total, main.detach(), mtp.detach(), balance.detach(), [routing.load() for routing in routings])


class Objective(NamedTuple):
    """What one step minimises, and the precision to compute it in."""

    mtp_loss_weight: float
    balance_loss_weight: float
    precision: Precision

    def computing(self, device: torch.device) -> AbstractContextManager[None]:
        """The precision of forward passes."""
        return computing_in(self.precision, device)

    def of_model(
        self,
        model: Transformer,
        tokens: Tensor,
        document_ids: Tensor | None,
        loss_mask: Tensor | None,
        shares: Tensor | None = None,
    ) -> Loss:
        """`training_loss` in this precision."""
        weights = {"mtp_loss_weight": self.mtp_loss_weight, "balance_loss_weight": self.balance_loss_weight}
        with self.computing(tokens.device):
            return training_loss(
                model, tokens, document_ids=document_ids, loss_mask=loss_mask, shares=shares, **weights
            )

    def of_hidden(
        self,
        model: PredictsAhead,
        hidden: Tensor,
        routings: list[Routing],
        tokens: Tensor,
        document_ids: Tensor | None,
        loss_mask: Tensor | None,
        shares: Tensor | None,
    ) -> Loss:
        """`prediction_loss` in the precision of the caller."""
        weights = {"mtp_loss_weight": self.mtp_loss_weight, "balance_loss_weight": self.balance_loss_weight}
        return prediction_loss(
            model, hidden, routings, tokens, document_ids=document_ids, loss_mask=loss_mask, shares=shares, **weights
        )


def cross_entropy(hidden: Tensor, weight_Zd: Tensor, targets: Tensor, *, all_learnt: bool = False) -> Tensor:
    """Mean cross-entropy in nats of hidden [..., d] through the output head, over targets that are not IGNORED.

    Logits exist for ROWS_AT_ONCE rows at a time, and their gradient is taken at once, so the [N, Z] matrix is never
    held; twin: F.cross_entropy of F.linear. all_learnt: none is IGNORED, so that nothing must wait for their count.
    """
    rows_Nd, targets_N = hidden.flatten(0, -2), targets.flatten()
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        rows_Nd, weight_Zd = rows_Nd.to(dtype), weight_Zd.to(dtype)
    loss: Tensor = _LinearCrossEntropy.apply(rows_Nd, weight_Zd, targets_N, all_learnt)  # type: ignore[assignment]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_Nd: Tensor, weight_Zd: Tensor, targets_N: Tensor, all_learnt: bool) -> Tensor:
        learns = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        count = len(targets_N) if all_learnt else max(1, int((targets_N != IGNORED).sum()))
        wide = torch.promote_types(hidden_Nd.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden_Nd.device)
        grad_hidden = torch.empty_like(hidden_Nd) if learns else None
        grad_weight = torch.zeros_like(weight_Zd, dtype=wide) if learns else None  # a sum over all chunks
        for start in range(0, hidden_Nd.shape[0], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            hidden, targets = hidden_Nd[rows], targets_N[rows]
            logits = products(hidden, weight_Zd, one_group := [len(hidden)])
            loss += cross_entropy_(logits, targets, 1.0 / count, learns)
            if grad_hidden is not None and grad_weight is not None:
                input_gradients(logits, weight_Zd, one_group, grad_hidden[rows])  # they have become their gradient
                if wide == hidden_Nd.dtype:
                    weight_gradients(logits, hidden, one_group, grad_weight, add=True)
                else:
                    grad_weight += weight_gradients(logits, hidden, one_group, torch.empty_like(weight_Zd))
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_Zd.dtype))
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        # The gradient of a mean is a loss weight, such as 0.3, which bf16 would round.
        by_hidden, by_weight = ((g.to(grad.dtype) * grad).to(g.dtype) for g in (grad_hidden, grad_weight))
        return by_hidden, by_weight, None, None
