"""`baleen train RECIPE --dry-run --world N`: what each rank would hold and send, and the cost engine held to it."""

from __future__ import annotations

from typing import Any

from baleen.cost.architecture import Architecture, from_model_config
from baleen.cost.flops import mtp_parameters, parameters
from baleen.cost.layout import Layout
from baleen.cost.memory import rank_memory, stage_parameters
from baleen.cost.schedule import schedule
from baleen.cost.simulator import Durations, execute
from baleen.cost.traffic import data_bytes, expert_all_to_all
from baleen.parallel.dryrun import dry_run
from baleen.parallel.mesh import Grid
from baleen.recipe import ParallelConfig, Recipe
from baleen.train.layout import check_layout, sequences_at_once
from baleen.train.loss import Objective
from baleen.train.schedule import Schedules

# How far a formula may lie from the count.
TOLERANCES = {"parameters": 0.0} | dict.fromkeys(
    ("weights", "gradients", "optimizer", "all_to_all", "data", "activations"), 0.02
)
STATIC = {"weights": "step_weights", "gradients": "step_gradients", "optimizer": "optimizer"}  # cost's words and ours
Ranks = list[dict[str, Any]]


def dry_run_recipe(recipe: Recipe, world: int) -> dict[str, Any]:
    """{grid, cost, disagree, fullest_rank_bytes, ranks}: an entry of `ranks` for each pipeline position.

    cost: {parameters, weights, gradients, optimizer, all_to_all, data, activations: {formula, counted, relative_error}}
    by `cost plan`'s formulas and as counted. Parameters are the model's; all else is bytes of a rank, the mean: held in
    a step, kept for the backward of one micro-batch (activations; left out where the plan knows no formula, for a part
    of what V3 recomputes), or leaving it for one and its reduction (data: weights and gradients).
    disagree: those that are off by more than TOLERANCES allow.
    fullest_rank_bytes: counted, with AdamW's two moments (Muon keeps one of its matrices), the weights' average if
    there is one, the activations of all micro-batches that the schedule has under way in its largest step, and
    buffers for what the stages of a pipeline receive in it.
    Raises UserError for a recipe that training on so many ranks would refuse.
    """
    train, parallel, arch = recipe.train, recipe.parallel, from_model_config(recipe.model)
    objective, sequences = Objective(train.mtp_loss_weight, train.balance_loss_weight, "fp32"), train.micro_batch_size
    grid = check_layout(recipe, world)
    multiple = 1 if world == 1 else sequences_at_once(recipe, grid.data)
    rows = Schedules(recipe).largest_batch(multiple) // grid.data
    sequences = sequences or rows
    micro_batches = max(1, rows // sequences)
    under_way = _micro_batches_under_way(parallel, grid, micro_batches)
    found = dry_run(recipe.model, parallel, objective, world=world, sequences=sequences, seq_len=train.seq_len)
    ranks = found["ranks"]
    held = [
        sum(rank[name] for name in STATIC.values())
        + (rank["weights"] if train.ema_decay else 0.0)  # their average lies beside them
        + rank["kept"] * count
        + _received(rank, micro_batches, count)
        for rank, count in zip(ranks, under_way, strict=True)
    ]
    kinds = len(parallel.recompute)
    layout = Layout(
        devices=world, pipeline=grid.pipeline, expert=grid.expert, zero=parallel.zero, shard=parallel.shard,
        schedule="1f1b" if parallel.schedule == "1f1b" else "dualpipev",  # both V-shaped ones hold the same weights
        recompute="modules" if kinds else "none", micro_batch=sequences,
    )  # fmt: skip
    formulas = _formulas(arch, layout, train.seq_len, mtp=bool(train.mtp_loss_weight), fp8=parallel.dispatch == "fp8")
    if kinds in (1, 2):  # the plan knows all of them or none
        del formulas["activations"]
    counts = _counts(found["parameters"], ranks)
    cost = {
        word: {"formula": formula, "counted": counts[word], "relative_error": _error(formula, counts[word])}
        for word, formula in formulas.items()
    }
    return {
        "grid": found["grid"],
        "cost": cost,
        "disagree": [word for word in cost if abs(cost[word]["relative_error"]) > TOLERANCES[word]],
        "fullest_rank_bytes": round(max(held)),
        "ranks": ranks,
    }


def _formulas(arch: Architecture, layout: Layout, seq_len: int, *, mtp: bool, fp8: bool) -> dict[str, float]:
    """Of one micro-batch; bytes are those of FP32, which the dry run computes in."""
    modules, stages = arch.num_nextn_predict_layers, layout.pipeline
    memory = rank_memory(arch, layout, seq_len=seq_len, micro_batches=1, precision="fp32")
    tied = arch.tie_word_embeddings
    held = stage_parameters(
        arch, layout, arch.num_hidden_layers / stages, ends=(1 if tied else 2) / stages, mtp=modules / stages
    )
    moe_layers = (arch.moe_layers + (arch.mtp_moe_modules if mtp else 0)) / stages
    a_token = expert_all_to_all(arch, layout, 1, "fp8" if fp8 else "fp32").network  # no two ranks share a domain
    return {
        "parameters": parameters(arch)["total"] + mtp_parameters(arch),
        # with ZeRO-3 the shards, half as large as their two moments: what the formula has gathered beside them is
        # freed again before the fake step is counted
        "weights": memory.weights if layout.zero < 3 else memory.optimizer / 2,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "all_to_all": 2 * moe_layers * layout.micro_batch * seq_len * a_token,  # forward and backward
        "data": sum(data_bytes(held, layout, "fp32", 1)),
        "activations": memory.activations + _beside(arch, layout, seq_len, mtp=mtp),
    }


def _beside(arch: Architecture, layout: Layout, seq_len: int, *, mtp: bool) -> float:
    """Bytes that a rank keeps on a CPU beside what the plan counts of its layers, the mean over the pipeline.

    PyTorch's attention there takes values as wide as keys, and o_proj a narrower copy of what comes out; its norms keep
    what they have scaled. Each loss, of the trunk and of MTP, holds its gradients of the hidden states and of the head
    until the backward.
    """
    modules, tokens, d = arch.num_nextn_predict_layers if mtp else 0, layout.micro_batch * seq_len, arch.hidden_size
    heads, wide, width = arch.num_attention_heads, arch.qk_head_dim, arch.v_head_dim
    padded = heads * (wide + (0 if layout.recompute == "modules" else wide - width)) if wide > width else 0
    scaled = 2 * d + (arch.q_lora_rank or 0) + (arch.kv_lora_rank or 0)
    losses = (1 + modules) * (tokens + arch.vocab_size) * d
    ends = (1 + modules) * tokens * 2 * d  # the last norms
    joined = modules * tokens * 6 * d  # MTP's two norms, and their outputs side by side
    layers = (arch.num_hidden_layers + modules) * tokens * (padded + scaled)
    return 4 * (layers + losses + ends + joined) / layout.pipeline


def _counts(parameters_in_all: int, ranks: Ranks) -> dict[str, float]:
    def mean(bytes_of: list[float]) -> float:
        return sum(bytes_of) / len(ranks)

    leaving = [rank["leaving"] for rank in ranks]
    all_to_all = [bytes_.get("alltoall_base", 0.0) for bytes_ in leaving]
    return {
        "parameters": parameters_in_all,
        **{word: mean([rank[name] for rank in ranks]) for word, name in STATIC.items()},
        "all_to_all": mean(all_to_all),
        "data": mean([sum(bytes_.values()) for bytes_ in leaving]) - mean(all_to_all),
        "activations": mean([rank["kept"] for rank in ranks]),
    }


def _error(formula: float, counted: float) -> float:
    return formula / counted - 1 if counted else float(formula > 0)


def _received(rank: dict[str, Any], micro_batches: int, under_way: float) -> float:
    """Bytes that PyTorch's stages receive into: for each micro-batch of the step, from its beginning to the next one's.

    The inputs of those under way are among what they keep.
    """
    return rank["inputs"] * (micro_batches - under_way) + rank["returned"] * micro_batches


def _micro_batches_under_way(parallel: ParallelConfig, grid: Grid, micro_batches: int) -> list[float]:
    """The most whose activations each pipeline rank keeps at once, by the order in which it runs them."""
    if grid.pipeline == 1:
        return [1.0]
    if parallel.schedule == "zbv":  # no rank keeps more than 1F1B's first
        return [float(min(grid.pipeline, micro_batches))] * grid.pipeline
    timeline = execute(schedule(parallel.schedule, grid.pipeline, micro_batches), Durations(1.0, 2.0, 1.0))
    return [peak / held for peak, held in zip(timeline.peak_activations, timeline.stages_held, strict=True)]
