"""`baleen train RECIPE --dry-run --world N`: what each rank would hold and send, beside what the cost engine counts."""

from __future__ import annotations

from typing import Any

from baleen.cost.architecture import from_model_config
from baleen.cost.flops import parameters
from baleen.cost.layout import Layout
from baleen.cost.memory import rank_memory
from baleen.cost.schedule import schedule
from baleen.cost.simulator import Durations, execute
from baleen.parallel.dryrun import dry_run
from baleen.parallel.mesh import Grid, make_grid
from baleen.recipe import ParallelConfig, Recipe
from baleen.train.loss import Objective

STATIC = {"weights": "step_weights", "gradients": "step_gradients", "optimizer": "optimizer"}  # cost's words and ours


def dry_run_recipe(recipe: Recipe, world: int) -> dict[str, Any]:
    """{grid, cost_parameters, cost_memory, fullest_rank_bytes, ranks}: an entry of `ranks` for each pipeline position.

    cost_memory: {weights, gradients, optimizer}, bytes in a step on a rank by formula and the mean of those counted.
    fullest_rank_bytes: these, counted, with the activations of all micro-batches that the schedule has under way.
    Raises UserError for an impossible layout.
    """
    train, parallel, arch = recipe.train, recipe.parallel, from_model_config(recipe.model)
    objective, sequences = Objective(train.mtp_loss_weight, train.balance_loss_weight, "fp32"), train.micro_batch_size
    grid = make_grid(parallel, recipe.model, world)
    micro_batches = max(1, train.batch_tokens // (train.seq_len * grid.data * max(1, sequences)))
    under_way = _micro_batches_under_way(parallel, grid, micro_batches)
    found = dry_run(recipe.model, parallel, objective, world=world, sequences=max(1, sequences), seq_len=train.seq_len)
    ranks = found["ranks"]
    held = [
        sum(rank[name] for name in STATIC.values()) + rank["kept"] * count
        for rank, count in zip(ranks, under_way, strict=True)
    ]
    layout = Layout(
        devices=world, pipeline=grid.pipeline, expert=grid.expert, zero=parallel.zero, shard=parallel.shard,
        schedule="1f1b" if parallel.schedule == "1f1b" else "dualpipev",  # both V-shaped ones hold the same weights
    )  # fmt: skip
    formula = rank_memory(arch, layout, seq_len=train.seq_len, micro_batches=micro_batches, precision="fp32")
    memory = {
        word: {"formula": getattr(formula, word), "counted": sum(rank[name] for rank in ranks) / len(ranks)}
        for word, name in STATIC.items()
    }
    return {
        "grid": found["grid"],
        "cost_parameters": parameters(arch),
        "cost_memory": memory,
        "fullest_rank_bytes": round(max(held)),
        "ranks": ranks,
    }


def _micro_batches_under_way(parallel: ParallelConfig, grid: Grid, micro_batches: int) -> list[float]:
    """The most whose activations each pipeline rank keeps at once, by the order in which it runs them."""
    if grid.pipeline == 1:
        return [1.0]
    if parallel.schedule == "zbv":  # no rank keeps more than 1F1B's first
        return [float(min(grid.pipeline, micro_batches))] * grid.pipeline
    timeline = execute(schedule(parallel.schedule, grid.pipeline, micro_batches), Durations(1.0, 2.0, 1.0))
    return [peak / held for peak, held in zip(timeline.peak_activations, timeline.stages_held, strict=True)]
