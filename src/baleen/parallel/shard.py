"""Data parallelism from outside: whole replicas, or weights, gradients and optimizer state in shards (FSDP2).

zero 0   whole replicas; gradients are all-reduced once a step
     1   optimizer state sharded: weights gathered and gradients scattered once a step
     2   gradients sharded too: scattered after every micro-batch
     3   weights sharded too: gathered for each layer, forward and backward

Gradients are summed, not averaged: every rank's loss is its share of the batch's.
"""

from __future__ import annotations

from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from baleen.model.layer import DecoderLayer
from baleen.model.moe import Experts
from baleen.model.mtp import MTPLayer
from baleen.parallel.mesh import Mesh


def shard(module: nn.Module, mesh: Mesh, zero: int) -> None:
    """Make `module`, a whole model or a stage of it, one of mesh.data replicas of it.

    Each decoder layer is gathered and scattered as one; experts, which have fewer replicas, by themselves.
    """
    if mesh.grid.data == 1:
        return
    lone_experts: set[nn.Parameter] = set()
    for experts in [m for m in module.modules() if isinstance(m, Experts)]:
        if mesh.grid.replicas == 1:
            lone_experts |= set(experts.parameters())
        else:
            _shard_unit(experts, mesh.replicas, mesh.hybrid_replicas, zero, zero == 3, set())
    for layer in [m for m in module.modules() if isinstance(m, DecoderLayer)]:
        # an MTP layer is entered by `predict`, not forward: what is small in it stays with the root
        unit = layer.self_attn if isinstance(layer, MTPLayer) else layer
        _shard_unit(unit, mesh.data, mesh.hybrid, zero, zero == 3, lone_experts)
    _shard_unit(module, mesh.data, mesh.hybrid, zero, False, lone_experts)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # else a sum that scales, which gloo does not have


def _shard_unit(
    module: nn.Module, whole: DeviceMesh, hybrid: DeviceMesh, zero: int, reshard: bool, ignored: set[nn.Parameter]
) -> None:
    if zero == 0:
        replicate(module, mesh=whole, ignored_params=ignored)
    else:
        fully_shard(module, mesh=hybrid, reshard_after_forward=reshard, ignored_params=ignored)


def synchronise(module: nn.Module, zero: int, *, last: bool) -> None:
    """Before the backward of a micro-batch, the last of its step or not: what is reduced and resharded after it."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last or zero >= 2)
        if zero in (1, 2):
            module.set_reshard_after_backward(last)
