"""What one process does in a training step: alone, or together with others on a mesh.

A worker holds the whole model or a part of it. Every rank's loss is its share of the whole batch's, so gradients,
losses and expert counts add up over ranks, and each rank ends a step with the same sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from baleen.model.moe import Gate
from baleen.model.transformer import Transformer
from baleen.parallel.stage import Objective


class MicroBatch(NamedTuple):
    """Sequences that pass the model at once, [B, T + 1] each.

    shares: what they are of the whole step, over all ranks, [2 + D] on the CPU: of the targets that are learnt, of the
    sequences, and of the targets of each of the D MTP depths. Where tokens are masked these differ.
    """

    tokens: Tensor
    document_ids: Tensor | None
    loss_mask: Tensor | None
    shares: Tensor

    def on(self, device: torch.device) -> MicroBatch:
        """Its sequences there, its shares where they are."""
        documents, mask = (rows if rows is None else rows.to(device) for rows in (self.document_ids, self.loss_mask))
        return MicroBatch(self.tokens.to(device), documents, mask, self.shares)


class Totals(NamedTuple):
    """Of a step, over all ranks: losses in nats a token, tokens per expert of every gate that took part, [E] each.

    nodes_reached: by a token in an MoE layer, the mean; None where experts are not spread over ranks.
    """

    main: float
    mtp: float
    balance: float
    loads: list[Tensor]
    nodes_reached: float | None = None


class Worker(Protocol):
    world: int
    data_rank: int  # which share of a batch is this rank's, of data_ranks
    data_ranks: int
    layout: str  # for people, and for comparing

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The model, or the stages of it that are here."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def model(self) -> Transformer:
        """The whole model, where there is one; if it is spread over ranks, all must call it together."""
        ...

    def init_weights(self, seed: int) -> None:
        """The numbers a model begins with: the same ones in every layout."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those held here, under their names in the whole model."""
        ...

    @property
    def gates(self) -> dict[int, Gate]:
        """Those held here, by their place among all gates of the model."""
        ...

    def accumulate(self, micro_batches: list[MicroBatch], objective: Objective) -> Totals:
        """Gradients of all micro-batches of all ranks."""
        ...

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm over all ranks is at most max_norm; returns it before that."""
        ...

    def sum(self, value: float) -> float:
        """Over the ranks that hold different sequences."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What this rank holds of the model's weights and saved buffers, by name; a tied matrix once."""
        ...

    def placed(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor shaped like this rank's part of parameter `name`, as a part of the whole: a view."""
        ...


class Alone:
    """One process with the whole model."""

    data_rank = 0
    world = data_ranks = 1
    layout = "one process"

    def __init__(self, model: Transformer):
        self.model = model
        self.parts: list[nn.Module] = [model]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def init_weights(self, seed: int) -> None:
        self.model.init_weights(seed)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    @property
    def gates(self) -> dict[int, Gate]:
        return dict(enumerate(self.model.gates))

    def accumulate(self, micro_batches: list[MicroBatch], objective: Objective) -> Totals:
        told: list[Tensor] = []  # read when all micro-batches are under way
        loads: list[Tensor] = []
        for micro_batch in micro_batches:
            loss = objective.of_model(self.model, *micro_batch)
            loss.total.backward()
            told.append(torch.stack((loss.main, loss.mtp, loss.balance)).double())
            loads = [a + b for a, b in zip(loads, loss.loads, strict=True)] if loads else loss.loads
        main, mtp, balance = torch.stack(told).sum(0).tolist()
        return Totals(main, mtp, balance, loads)

    def clip_gradients(self, max_norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def sum(self, value: float) -> float:
        return value

    def tensors(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        if self.model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        return state

    def placed(self, name: str, tensor: Tensor) -> Tensor:
        return tensor
