"""A pipeline stage: consecutive layers cut out of a Transformer, under the names they have there.

Shapes: B sequences of a micro-batch, T positions, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from baleen.config import ModelConfig, UserError
from baleen.model.attention import Context, document_mask
from baleen.model.moe import DeepseekMoE, Gate, Routing, sequence_balance_loss
from baleen.model.mtp import MTPLayer
from baleen.model.transformer import Output, Transformer


class Losses(Protocol):
    """What a loss over a micro-batch tells; `train.loss.Loss` is one."""

    @property
    def total(self) -> Tensor: ...
    @property
    def main(self) -> Tensor: ...
    @property
    def mtp(self) -> Tensor: ...
    @property
    def balance(self) -> Tensor: ...
    @property
    def loads(self) -> list[Tensor]: ...


class Objective(Protocol):
    """What is minimised, for whole models and for the last stage of a cut one; `train.loss.Objective` is it."""

    @property
    def balance_loss_weight(self) -> float: ...

    def computing(self, device: torch.device) -> AbstractContextManager[None]:
        """The precision of forward passes."""
        ...

    def of_model(
        self,
        model: Transformer,
        tokens: Tensor,
        document_ids: Tensor | None,
        loss_mask: Tensor | None,
        shares: Tensor | None = None,
    ) -> Losses: ...

    def of_hidden(
        self,
        model: Stage,
        hidden: Tensor,
        routings: list[Routing],
        tokens: Tensor,
        document_ids: Tensor | None,
        loss_mask: Tensor | None,
        shares: Tensor | None,
    ) -> Losses:
        """From the trunk's output on; `model` gives predict_ahead, lm_head and config."""
        ...


def split_layers(config: ModelConfig, stages: int) -> list[range]:
    """Trunk layers of each stage. The last stage also holds head and MTP, and has as many layers less.

    The head counts as one layer: V3's (7168 x 129280) multiplies as much as one and a half of its layers.
    """
    last = config.num_nextn_predict_layers + 1
    units, L = config.num_hidden_layers + last, config.num_hidden_layers
    if stages - 1 > L:
        raise UserError(f"{L} layers do not fill {stages} pipeline stages: take at most {L + 1} stages")
    sizes = [units // stages + (stage < units % stages) for stage in range(stages)]
    sizes[-1] = max(0, sizes[-1] - last)
    for _ in range(sum(sizes) - L):  # MTP and head fill the last stage and more: the others give up layers
        sizes[sizes.index(max(sizes))] -= 1
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


class Told(NamedTuple):
    """What one micro-batch told on its way through one stage: its part of the step's."""

    main: Tensor
    mtp: Tensor
    balance: Tensor
    loads: list[Tensor]  # of the stage's gates, in order


class Stage(nn.Module):
    """Layers `layers` of a model. The first stage embeds, the last one predicts and gives the loss.

    MTP embeds too. Where the last stage is on the first one's rank (V-shaped schedules), both use one embedding,
    which belongs to the first: V3 places them so (§3.2.1). Elsewhere the last stage has a copy.

    A gradient of the sequence-wise balance loss starts in each stage: the sum need not travel.
    """

    objective: Objective

    def __init__(self, model: Transformer, layers: range, *, first: bool, last: bool, lends_embedding: bool):
        super().__init__()
        config = model.config
        assert not config.tie_word_embeddings, "one matrix at both ends: make_grid refuses it"
        self.config, self.first, self.last = config, first, last
        self._layers = [str(i) for i in layers]
        self._mtp = [str(config.num_hidden_layers + k) for k in range(config.num_nextn_predict_layers)] if last else []
        self.model = nn.Module()
        self.model.rotary = model.model.rotary
        self.model.layers = nn.ModuleDict({name: model.model.layers[int(name)] for name in self._layers + self._mtp})
        self._lent = (model.model.embed_tokens,)  # in a tuple, so that it is not this module's
        if first or (self._mtp and not lends_embedding):
            self.model.embed_tokens = model.model.embed_tokens
        if last:
            self.model.norm, self.lm_head = model.model.norm, model.lm_head
        self.told: list[Told] = []

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """With a borrowed embedding: a backward that is split in two takes gradients of these and no others."""
        yield from super().parameters(recurse)
        if self._mtp and "embed_tokens" not in self.model._modules:
            yield from self._lent[0].parameters()

    @property
    def gates(self) -> dict[int, Gate]:
        """By layer."""
        layers = self.model.layers.items()  # type: ignore[operator]
        return {int(name): layer.mlp.gate for name, layer in layers if isinstance(layer.mlp, DeepseekMoE)}

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        shares: Tensor,
        document_ids: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, d], or at the first stage tokens [B, T + 1] -> hidden states, or at the last the loss.

        tokens, document_ids, loss_mask: [B, T + 1], known to every rank. shares: MicroBatch's, [1, 2 + D].
        """
        with self.objective.computing(tokens.device):
            return self._forward(x, tokens, shares[0], document_ids, loss_mask)

    def _forward(
        self, x: Tensor, tokens: Tensor, shares: Tensor, document_ids: Tensor | None, loss_mask: Tensor | None
    ) -> Tensor:
        T = tokens.shape[1] - 1
        x_BTd = self._lent[0](x[:, :T]) if self.first else x
        context = self._context(x_BTd, None if document_ids is None else document_ids[:, :T])
        routings: list[Routing] = []
        for name in self._layers:
            x_BTd, routing = self.model.layers[name](x_BTd, context)  # type: ignore[index]
            routings += [] if routing is None else [routing]
        if self.last:
            hidden = self.model.norm(x_BTd)  # type: ignore[operator]
            loss = self.objective.of_hidden(self, hidden, routings, tokens, document_ids, loss_mask, shares)
            self.told.append(Told(loss.main, loss.mtp, loss.balance, loss.loads))
            return loss.total
        balance = x_BTd.new_zeros(())
        if self.objective.balance_loss_weight and routings:
            top_k = self.config.num_experts_per_tok
            balances = [sequence_balance_loss(r, x.shape[0], top_k) for r in routings]
            balance = torch.stack(balances).sum() * shares[1].to(x_BTd)
            x_BTd = attach_loss(x_BTd, self.objective.balance_loss_weight * balance)
        zero = balance.new_zeros(())
        self.told.append(Told(zero, zero, balance.detach(), [routing.load() for routing in routings]))
        return x_BTd

    def predict_ahead(
        self, depth: int, hidden_BTd: Tensor, next_ids_BT: Tensor, *, document_ids_BT: Tensor | None
    ) -> Output:
        """As Transformer.predict_ahead."""
        layer: MTPLayer = self.model.layers[self._mtp[depth]]  # type: ignore[index, assignment]
        context = self._context(hidden_BTd, document_ids_BT)
        hidden, routing = layer.predict(hidden_BTd, self._lent[0](next_ids_BT), context)
        return Output(hidden, [] if routing is None else [routing])

    def _context(self, x_BTd: Tensor, document_ids_BT: Tensor | None) -> Context:
        B, T = x_BTd.shape[:2]
        positions_BT = torch.arange(T, device=x_BTd.device).expand(B, T)
        dtype = next(super().parameters()).dtype  # not x's, which autocast may have made bf16
        cos, sin = self.model.rotary(positions_BT, dtype)  # type: ignore[operator]
        return Context(cos, sin, document_mask(document_ids_BT), None)


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x, with a gradient of 1 into `loss` as soon as x gets its own."""
    out: Tensor = _AttachLoss.apply(x, loss)  # type: ignore[assignment]
    return out


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.clone()  # zero-bubble schedules detach a stage's output in place, which a view would not allow

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)
