"""`baleen train RECIPE --dry-run --world N`: what each rank would hold and send, beside what the cost engine counts."""

from __future__ import annotations

from typing import Any

from baleen.config import Recipe
from baleen.cost.architecture import from_model_config
from baleen.cost.flops import parameters
from baleen.parallel.dryrun import dry_run
from baleen.train.loss import Objective


def dry_run_recipe(recipe: Recipe, world: int) -> dict[str, Any]:
    """{grid, cost_parameters, fullest_rank_bytes, ranks}: `ranks` has an entry for each pipeline position.

    Raises UserError for an impossible layout.
    """
    train = recipe.train
    objective = Objective(train.mtp_loss_weight, train.balance_loss_weight, "fp32")
    found = dry_run(
        recipe.model,
        recipe.parallel,
        objective,
        world=world,
        sequences=max(1, train.micro_batch_size),
        seq_len=train.seq_len,
    )
    held = [rank["weights"] + rank["gradients"] + rank["optimizer"] + rank["kept"] for rank in found["ranks"]]
    return {
        "grid": found["grid"],
        "cost_parameters": parameters(from_model_config(recipe.model)),
        "fullest_rank_bytes": max(held),
        "ranks": found["ranks"],
    }
