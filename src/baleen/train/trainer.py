"""One training step, and all that a later step depends on."""

from __future__ import annotations

import platform
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baleen.config import UserError
from baleen.data.loader import Batch, Loader
from baleen.model.native.training import kernels
from baleen.model.transformer import Transformer
from baleen.parallel.ranks import fingerprint_of_code
from baleen.parallel.recompute import recompute
from baleen.parallel.worker import Alone, MicroBatch, Worker
from baleen.recipe import Recipe
from baleen.train.checkpoint import Checkpoint, Stored
from baleen.train.fp8 import use_fp8
from baleen.train.layout import sequences_at_once
from baleen.train.loss import Objective
from baleen.train.optimizer import Optimizer
from baleen.train.precision import Precision, resolve_precision
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
    nodes_reached: float | None = None  # by a token, the mean; None where experts are not spread over ranks

    @property
    def max_violation(self) -> float:
        """Largest over mean load less one, averaged over the MoE layers (arXiv 2408.15664)."""
        return max_violation(self.loads)

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"loads": [load.tolist() for load in self.loads]}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> StepResult:
        rest = {key: value for key, value in row.items() if key != "loads"}
        return cls(**rest, loads=[torch.tensor(load) for load in row["loads"]])


def max_violation(loads: list[Tensor]) -> float:
    """Largest over mean load less one, averaged over the layers; loads are tokens per expert, [E] each."""
    excess = [(load.max() / load.double().mean() - 1).item() for load in loads]
    return sum(excess) / len(excess) if excess else 0.0


class Trainer:
    """A model with its optimizer, loader, schedules and counters: everything that a checkpoint must bring back."""

    def __init__(self, recipe: Recipe, worker: Worker | Transformer, loader: Loader):
        """worker: this process's share of the work; a whole model works alone."""
        self.recipe, self.loader = recipe, loader
        self.worker: Worker = Alone(worker) if isinstance(worker, Transformer) else worker
        for part in self.worker.parts:
            recompute(part, recipe.parallel.recompute)
        self.optimizer = Optimizer(self.worker, recipe.train)
        self.schedules = Schedules(recipe)
        self.precision: Precision = resolve_precision(recipe.train.precision, self.worker.device)
        if self.precision == "fp8":
            assert self.worker.world == 1, "check_layout refuses it"
            use_fp8(self.model)
        self.counters = Counters()
        self.ema = {n: t.detach().clone() for n, t in self.worker.tensors().items()} if recipe.train.ema_decay else {}

    @property
    def model(self) -> Transformer:
        return self.worker.model

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
        """One optimizer step over one global batch. A gradient that is not finite changes no weight, moment, bias or
        average: `skipped` counts it."""
        started = time.monotonic()
        train, position = self.recipe.train, self.position
        sequences = self.schedules.batch_sequences(position, multiple=self._sequences_at_once)
        batch = self.loader.next_batch(sequences)
        self.optimizer.zero_grad()
        objective = Objective(self.schedules.mtp_loss_weight(position), train.balance_loss_weight, self.precision)
        totals = self.worker.accumulate(self._micro_batches(batch), objective)
        norm = self.worker.clip_gradients(train.clip_norm)
        lr = self.schedules.lr(position)
        if torch.isfinite(norm):
            self.optimizer.step(lr)
            for place, gate in self.worker.gates.items():
                if place < len(totals.loads):  # the MTP layers may be left out
                    gate.update_bias(totals.loads[place], self.schedules.bias_update_speed(position))
            if self.ema:
                weights, step = self.worker.tensors(), self.counters.step
                decay = min(train.ema_decay, (1 + step) / (10 + step))  # else short runs average their random start
                for name, average in self.ema.items():
                    average.lerp_(weights[name], 1 - decay)
        else:
            self.counters.skipped += 1
        self.counters.step += 1
        tokens, seconds = sequences * (batch.tokens.shape[1] - 1), time.monotonic() - started
        self.counters.tokens += tokens
        self.counters.seconds += seconds
        main, mtp, balance, loads, nodes = totals
        return StepResult(main, mtp, balance, norm.item(), lr, loads, tokens, seconds, nodes)

    @property
    def _sequences_at_once(self) -> int:
        return 1 if self.worker.world == 1 else sequences_at_once(self.recipe, self.worker.data_ranks)

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """This rank's sequences by micro-batches."""
        size = self.recipe.train.micro_batch_size or len(batch.tokens)
        documents = batch.document_ids if self.recipe.train.document_mask else None
        cut = [
            MicroBatch(*rows, shares=torch.empty(0))
            for rows in zip(
                *(
                    [None] * -(-len(batch.tokens) // size) if rows is None else rows.split(size)
                    for rows in (batch.tokens, documents, batch.loss_mask)
                ),
                strict=True,
            )
        ]
        depth = self.recipe.model.num_nextn_predict_layers

        def learnt(m: MicroBatch, ahead: int) -> int:
            return m.tokens[:, ahead:].numel() if m.loss_mask is None else int(m.loss_mask[:, ahead:].sum())

        rows = [[learnt(m, 1), len(m.tokens), *(learnt(m, 1 + k) for k in range(1, depth + 1))] for m in cut]
        counts = torch.tensor(rows, dtype=torch.float64)
        totals = [max(1.0, self.worker.sum(count)) for count in counts.sum(0).tolist()]
        counts /= torch.tensor(totals, dtype=torch.float64)
        device = self.worker.device  # what was counted above did not wait for it
        return [m._replace(shares=one).on(device) for m, one in zip(cut, counts, strict=True)]

    def checkpoint(self) -> Checkpoint:
        """Of tensors that are spread over ranks it holds this rank's part, as DTensors."""
        tensors = {"model": self.worker.tensors(), "optimizer": self.optimizer.state_tensors()}
        if self.ema:
            tensors["ema"] = self.ema
        tensors = {group: self._placed(group, members) for group, members in tensors.items()}
        state = {
            "counters": asdict(self.counters),
            "loader": self.loader.state_dict(),
            "rng": {"torch": torch.get_rng_state().tolist(), "python": random.getstate()},
            "environment": self._environment(),
        }
        return Checkpoint(self.counters.step, tensors, state)

    def restore(self, checkpoint: Stored) -> list[str]:
        """Continue from a checkpoint of any layout; returns what differs from the run that wrote it, in words.

        Raises UserError if the checkpoint is of another model.
        """
        optimizer = self.optimizer.empty_state_tensors(checkpoint.names("optimizer"))
        groups = {"model": self.worker.tensors(), "optimizer": optimizer, "ema": self.ema}
        if self.worker.world == 1:
            unknown = set(checkpoint.names("model")) - set(groups["model"])
            if unknown:
                raise UserError(f"checkpoint step-{checkpoint.step} is of another model: it has {min(unknown)}")
        checkpoint.read_into({group: self._placed(group, members) for group, members in groups.items()})
        self.optimizer.load_state_tensors(optimizer)
        state: dict[str, Any] = checkpoint.state
        self.counters = Counters(**state["counters"])
        self.loader.load_state_dict(state["loader"])
        torch.set_rng_state(torch.tensor(state["rng"]["torch"], dtype=torch.uint8))
        version, internal, gauss = state["rng"]["python"]
        random.setstate((version, tuple(internal), gauss))
        now, then = self._environment(), state["environment"]
        return [f"{key} was {then.get(key)}, is {now[key]}" for key in now if now[key] != then.get(key)]

    def _placed(self, group: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each as a part of the whole; an optimizer's tensors are named PARAMETER.STATE."""
        parameter_of = (lambda name: name.rpartition(".")[0]) if group == "optimizer" else str
        return {name: self.worker.placed(parameter_of(name), tensor) for name, tensor in tensors.items()}

    def _environment(self) -> dict[str, Any]:
        """What must be equal for a resumed run to equal the straight one bit for bit."""
        return {**environment(self.precision), "layout": self.worker.layout}


def processor() -> str:
    """The name of the CPU's model; its architecture where the system does not tell."""
    file = Path("/proc/cpuinfo")
    names = [line for line in file.read_text().splitlines() if line.startswith("model name")] if file.exists() else []
    return names[0].partition(": ")[2] if names else platform.machine()


def environment(precision: Precision) -> dict[str, Any]:
    """What of the machine and the build decides over the last bit of a step."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "precision": precision,
        "kernels": kernels(),
        "code": fingerprint_of_code(),
    }
