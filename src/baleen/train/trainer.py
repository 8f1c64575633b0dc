"""One training step, and all that a later step depends on."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from baleen.config import Recipe, UserError
from baleen.data.loader import Batch, Loader
from baleen.model.native.training import kernels
from baleen.model.transformer import Transformer
from baleen.train.checkpoint import Checkpoint
from baleen.train.loss import training_loss
from baleen.train.optimizer import Optimizer
from baleen.train.precision import Precision, computing_in, resolve_precision
from baleen.train.schedule import Schedules


@dataclass
class Counters:
    step: int = 0
    tokens: int = 0
    skipped: int = 0  # steps whose gradient was not finite
    seconds: float = 0.0  # spent in steps
    wall_seconds: float = 0.0  # spent in all, evaluation and samples included


@dataclass
class StepResult:
    """What one step tells: losses in nats a token, the gradient's norm before clipping, the load of each gate."""

    loss: float
    mtp_loss: float
    balance_loss: float
    grad_norm: float
    lr: float
    loads: list[Tensor]
    tokens: int = 0
    seconds: float = 0.0

    @property
    def max_violation(self) -> float:
        """Largest over mean load less one, averaged over the MoE layers (arXiv 2408.15664)."""
        return max_violation(self.loads)


def max_violation(loads: list[Tensor]) -> float:
    """Largest over mean load less one, averaged over the layers; loads are tokens per expert, [E] each."""
    excess = [(load.max() / load.double().mean() - 1).item() for load in loads]
    return sum(excess) / len(excess) if excess else 0.0


class Trainer:
    """A model with its optimizer, loader, schedules and counters: everything that a checkpoint must bring back."""

    def __init__(self, recipe: Recipe, model: Transformer, loader: Loader):
        self.recipe, self.model, self.loader = recipe, model, loader
        self.optimizer = Optimizer(model, recipe.train)
        self.schedules = Schedules(recipe)
        self.precision: Precision = resolve_precision(recipe.train.precision, model.device)
        self.counters = Counters()
        self.ema = {n: t.detach().clone() for n, t in weights_of(model).items()} if recipe.train.ema_decay else {}

    @property
    def position(self) -> float:
        """Where the schedules stand, in tokens: those trained on, or the share of train.minutes that is used up."""
        train = self.recipe.train
        by_clock = train.tokens * self.counters.wall_seconds / (60 * train.minutes) if train.minutes else 0.0
        return max(self.counters.tokens, by_clock)

    @property
    def done(self) -> bool:
        return self.position >= self.recipe.train.tokens

    def step(self) -> StepResult:
        """One optimizer step over one global batch. A gradient that is not finite changes nothing but `skipped`."""
        started = time.monotonic()
        train, position = self.recipe.train, self.position
        batch = self.loader.next_batch(self.schedules.batch_sequences(position))
        self.optimizer.zero_grad()
        result = self._forward_backward(batch, self.schedules.mtp_loss_weight(position))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm)
        result.grad_norm, result.lr = norm.item(), self.schedules.lr(position)
        if torch.isfinite(norm):
            self.optimizer.step(result.lr)
            for gate, load in zip(self.model.gates, result.loads, strict=False):
                gate.update_bias(load, self.schedules.bias_update_speed(position))
            if self.ema:
                weights, step = weights_of(self.model), self.counters.step
                decay = min(train.ema_decay, (1 + step) / (10 + step))  # else short runs average their random start
                for name, average in self.ema.items():
                    average.lerp_(weights[name], 1 - decay)
        else:
            self.counters.skipped += 1
        self.counters.step += 1
        result.tokens = batch.tokens.shape[0] * (batch.tokens.shape[1] - 1)
        result.seconds = time.monotonic() - started
        self.counters.tokens += result.tokens
        self.counters.seconds += result.seconds
        return result

    def _forward_backward(self, batch: Batch, mtp_loss_weight: float) -> StepResult:
        """Accumulates gradients over micro-batches, each weighted by its share of the learnt targets."""
        B = batch.tokens.shape[0]
        size = self.recipe.train.micro_batch_size or B
        total = StepResult(0.0, 0.0, 0.0, 0.0, 0.0, [])
        documents = batch.document_ids if self.recipe.train.document_mask else None
        for start in range(0, B, size):
            tokens, document_ids, loss_mask = (
                None if rows is None else rows[start : start + size].to(self.model.device)
                for rows in (batch.tokens, documents, batch.loss_mask)
            )
            assert tokens is not None
            share = tokens.shape[0] / B
            if batch.loss_mask is not None and loss_mask is not None:
                share = float(loss_mask[:, 1:].sum() / batch.loss_mask[:, 1:].sum().clamp(min=1))
            with computing_in(self.precision, self.model.device):
                loss = training_loss(
                    self.model,
                    tokens,
                    mtp_loss_weight=mtp_loss_weight,
                    balance_loss_weight=self.recipe.train.balance_loss_weight,
                    document_ids=document_ids,
                    loss_mask=loss_mask,
                )
            (loss.total * share).backward()
            total.loss += loss.main.item() * share
            total.mtp_loss += loss.mtp.item() * share
            total.balance_loss += loss.balance.item() * share
            total.loads = [a + b for a, b in zip(total.loads, loss.loads, strict=True)] if total.loads else loss.loads
        return total

    def checkpoint(self) -> Checkpoint:
        tensors = {"model": weights_of(self.model), "optimizer": self.optimizer.state_tensors()}
        if self.ema:
            tensors["ema"] = self.ema
        state = {
            "counters": asdict(self.counters),
            "loader": self.loader.state_dict(),
            "rng": {"torch": torch.get_rng_state().tolist(), "python": random.getstate()},
            "environment": environment(self.precision),
        }
        return Checkpoint(self.counters.step, tensors, state)

    def restore(self, checkpoint: Checkpoint) -> list[str]:
        """Continue from a checkpoint; returns what differs from the machine that wrote it, in words.

        Raises UserError if the checkpoint is of another model.
        """
        try:
            weights = checkpoint.tensors["model"]
            if self.model.config.tie_word_embeddings:
                weights = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
            self.model.load_state_dict(weights, assign=False)
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"checkpoint step-{checkpoint.step} is of another model: {reason}") from None
        self.optimizer.load_state_tensors(checkpoint.tensors["optimizer"])
        for name, tensor in self.ema.items():
            tensor.copy_(checkpoint.tensors["ema"][name])
        state: dict[str, Any] = checkpoint.state
        self.counters = Counters(**state["counters"])
        self.loader.load_state_dict(state["loader"])
        torch.set_rng_state(torch.tensor(state["rng"]["torch"], dtype=torch.uint8))
        version, internal, gauss = state["rng"]["python"]
        random.setstate((version, tuple(internal), gauss))
        now, then = environment(self.precision), state["environment"]
        return [f"{key} was {then.get(key)}, is {now[key]}" for key in now if now[key] != then.get(key)]


def environment(precision: Precision) -> dict[str, Any]:
    """What must be equal for a resumed run to equal the straight one bit for bit."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "precision": precision,
        "kernels": kernels(),
    }


def weights_of(model: Transformer) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, a tied matrix once."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state
