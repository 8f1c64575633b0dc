"""Where experts live: redundant copies of the busy ones, and a place for each copy (EPLB, V3 §3.4).

Source: github.com/deepseek-ai/EPLB, whose worked example is a test here. Shapes: L layers, E experts, P physical
copies, C the most copies one expert has, G GPUs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from baleen.config import UserError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Placement(NamedTuple):
    """Slots are numbered GPU by GPU, P / G slots on each, GPUs node by node."""

    expert_of_slot: Ints  # [L, P]
    slots_of_expert: Ints  # [L, E, C], -1 where an expert has fewer copies
    copies: Ints  # [L, E]

    def gpu_load(self, load: ArrayLike, num_gpus: int) -> Floats:
        """[L, G]: load on each GPU when an expert's load is shared equally by its copies."""
        per_copy_LE = np.asarray(load, dtype=np.float64) / self.copies
        per_slot_LP = np.take_along_axis(per_copy_LE, self.expert_of_slot, axis=1)
        return per_slot_LP.reshape(len(per_slot_LP), num_gpus, -1).sum(axis=2)


def place_experts(load: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Placement:
    """Places `num_replicas` copies of the experts so that GPUs, and before them nodes, are equally loaded.

    load: [L, E] tokens, or any estimate of them, per expert. Where nodes divide the expert groups, a group stays on
    one node (group-limited routing then crosses the network less); otherwise nodes and groups are ignored.
    Raises UserError where the counts do not divide.
    """
    load_LE = np.asarray(load, dtype=np.float64)
    _check(load_LE, num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    layers = [_place_layer(load_E, num_replicas, num_groups, num_nodes, num_gpus) for load_E in load_LE]
    expert_LP = np.stack(layers)

    num_experts = load_LE.shape[1]
    copies_LE = np.stack([np.bincount(expert_P, minlength=num_experts) for expert_P in expert_LP])
    slots_LEC = np.full((*load_LE.shape, copies_LE.max()), -1, dtype=np.int64)
    for layer, expert_P in enumerate(expert_LP):
        for expert in range(num_experts):
            slots = np.flatnonzero(expert_P == expert)
            slots_LEC[layer, expert, : len(slots)] = slots
    return Placement(expert_LP, slots_LEC, copies_LE)


def _place_layer(load_E: Floats, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Ints:
    """The expert in each slot, [P]."""
    # 1. Pack expert groups onto nodes, as many on each, by their load.
    experts_of_group = np.arange(len(load_E)).reshape(num_groups, -1)
    node_groups = pack_evenly(load_E.reshape(num_groups, -1).sum(axis=1), num_nodes)

    slots = []
    for groups in node_groups:
        experts = experts_of_group[groups].reshape(-1)
        # 2. Within the node, give each redundant copy to the expert whose copies are the busiest.
        copied = replicate(load_E[experts], num_replicas // num_nodes)
        # 3. Pack the copies onto the node's GPUs, as many on each, by the load of a copy.
        load_P = (load_E[experts] / np.bincount(copied))[copied]
        gpu_slots = pack_evenly(load_P, num_gpus // num_nodes)
        slots.append(experts[copied[gpu_slots.reshape(-1)]])
    return np.concatenate(slots)


def replicate(load_E: Floats, num_replicas: int) -> Ints:
    """The expert of each of `num_replicas` copies: first every expert once, then the busiest per copy again, [P]."""
    copies_E = np.ones(len(load_E))
    extra = []
    for _ in range(num_replicas - len(load_E)):
        busiest = int(np.argmax(load_E / copies_E))
        copies_E[busiest] += 1
        extra.append(busiest)
    return np.array([*range(len(load_E)), *extra], dtype=np.int64)


def pack_evenly(load_N: Floats, num_packs: int) -> Ints:
    """Items of each pack, [num_packs, N / num_packs]: heaviest first, each into the lightest pack with room."""
    size = len(load_N) // num_packs
    if size == 1:
        return np.arange(num_packs).reshape(num_packs, 1)
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    load_of_pack = np.zeros(num_packs)
    for item in np.argsort(-load_N, kind="stable"):
        open_packs = [pack for pack in range(num_packs) if len(packs[pack]) < size]
        lightest = min(open_packs, key=load_of_pack.__getitem__)
        packs[lightest].append(int(item))
        load_of_pack[lightest] += load_N[item]
    return np.array(packs, dtype=np.int64)


def _check(load_LE: Floats, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    if load_LE.ndim != 2 or not load_LE.size:
        raise UserError(f"expert load has shape {load_LE.shape}: give one row per layer and one column per expert")
    if not np.isfinite(load_LE).all() or (load_LE < 0).any():
        raise UserError("expert load holds a negative or non-finite number: give token counts")
    num_experts = load_LE.shape[1]
    if min(num_groups, num_nodes, num_gpus) < 1:
        raise UserError(f"{num_groups} groups, {num_nodes} nodes, {num_gpus} GPUs: each must be at least 1")
    if num_replicas < num_experts:
        raise UserError(f"{num_replicas} replicas cannot hold {num_experts} experts: take at least {num_experts}")
    for what, number, by, unit in (
        ("experts", num_experts, num_groups, "groups"),
        ("GPUs", num_gpus, num_nodes, "nodes"),
        ("replicas", num_replicas, num_gpus, "GPUs"),
    ):
        if number % by:
            low = number - number % by
            near = f"{low} or {low + by}" if low else str(by)
            raise UserError(f"{number} {what} do not divide over {by} {unit}: take {near} {what}")
