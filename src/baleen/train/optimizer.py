"""The optimizers of a run: AdamW for everything, or Muon for the hidden matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from baleen.config import UserError
from baleen.model.machine import multiplies_bf16
from baleen.parallel.worker import Worker
from baleen.recipe import TrainConfig
from baleen.train.muon import Muon


class Optimizer:
    """One or two torch optimizers that step as one; its state is a flat dict of tensors by parameter name."""

    def __init__(self, model: nn.Module | Worker, config: TrainConfig):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hidden = {n for n, p in named.items() if config.optimizer == "muon" and _is_hidden_matrix(n, p)}
        apart = {n for n in named if config.embedding_lr_scale != 1.0 and n.endswith("embed_tokens.weight")}
        decayed = [p for n, p in named.items() if n not in hidden | apart and p.ndim >= 2]
        plain = [p for n, p in named.items() if n not in hidden and p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        if apart:
            embedding = [named[n] for n in apart]
            scale = config.embedding_lr_scale
            # Decoupled decay is a share of the learning rate; the share of each weight stays what it is elsewhere.
            groups.append({"params": embedding, "lr_scale": scale, "weight_decay": config.weight_decay / scale})
        adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.parts: list[torch.optim.Optimizer] = [adamw]
        if hidden:
            stacked = [named[n] for n in sorted(hidden) if n.endswith("gate_up_proj")]
            single = [named[n] for n in sorted(hidden) if not n.endswith("gate_up_proj")]
            groups = [{"params": single, "matrices": 1}, {"params": stacked, "matrices": 2}]
            dtype = torch.bfloat16 if multiplies_bf16(single[0].device) else torch.float32
            groups = [group for group in groups if group["params"]]
            self.parts.append(Muon(groups, config.lr, config.weight_decay, dtype=dtype))
        self._named = named

    def step(self, lr: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """{"<parameter>.<state>": tensor}, such as model.norm.weight.exp_avg; empty before the first step."""
        return {
            f"{name}.{key}": value
            for name, parameter in self._named.items()
            for part in self.parts
            for key, value in part.state.get(parameter, {}).items()
        }

    def empty_state_tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Room for those of `names`, keys of `state_tensors`, that are of parameters held here."""
        room = {}
        for key in names:
            name, _, state = key.rpartition(".")
            if name in self._named:
                parameter = self._named[name]
                moment = torch.zeros_like(parameter, requires_grad=False)
                # A fused optimizer counts its steps on the parameter's device.
                room[key] = moment.new_zeros((), dtype=torch.float32) if state == "step" else moment
        return room

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse. Raises UserError if a tensor is of no parameter, of another shape or of another optimizer."""
        for key, value in tensors.items():
            name, _, state = key.rpartition(".")
            parameter = self._named.get(name)
            if parameter is not None:
                owner = next(p for p in self.parts if any(parameter is q for g in p.param_groups for q in g["params"]))
                kinds = ("momentum_buffer",) if isinstance(owner, Muon) else ("step", "exp_avg", "exp_avg_sq")
                if state in kinds and value.shape == (() if state == "step" else parameter.shape):
                    owner.state[parameter][state] = value.clone()
                    continue
            raise UserError(f"the optimizer state {key!r} fits no parameter: the checkpoint is of another model")


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Matrices between hidden states; embeddings, the head, routers and vectors stay with AdamW."""
    return parameter.ndim >= 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight"))
