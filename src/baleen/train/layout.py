"""Whether a recipe can be trained by so many processes: all that is known before one of them starts."""

from __future__ import annotations

from baleen.config import UserError
from baleen.parallel.mesh import Grid, least_micro_batches, make_grid
from baleen.recipe import Recipe
from baleen.train.schedule import Schedules


def check_layout(recipe: Recipe, world: int) -> Grid:
    """The grid of ranks. Raises UserError, naming what would work, if they cannot train this recipe."""
    train = recipe.train
    grid = make_grid(recipe.parallel, recipe.model, world)
    if recipe.parallel.dispatch == "fp8" and grid.expert == 1:
        raise UserError("parallel.dispatch=fp8 is for experts that are spread over ranks: set parallel.expert too")
    if world == 1:
        return grid
    sequences, at_once = train.batch_tokens // train.seq_len, sequences_at_once(recipe, grid.data)
    if sequences % at_once:
        near = max(1, round(sequences / at_once)) * at_once * train.seq_len
        raise UserError(
            f"train.batch_tokens={train.batch_tokens} are {sequences} sequences, which do not divide over {grid.data} "
            f"data-parallel ranks with train.micro_batch_size={train.micro_batch_size}: take {near}"
        )
    _check_smallest_batch(recipe, grid)
    if train.eval_every:
        raise UserError("train.eval_every is for one process: set it to 0 and use `baleen eval` on the run's model")
    if train.optimizer == "muon" and recipe.parallel.zero:
        raise UserError("Muon needs whole matrices: take parallel.zero=0, or train.optimizer=adamw")
    if train.precision == "fp8":
        raise UserError(
            "train.precision=fp8 is for one process: take bf16; experts apart may take parallel.dispatch=fp8"
        )
    return grid


def sequences_at_once(recipe: Recipe, data_ranks: int) -> int:
    """Batches of several ranks are multiples of this, so that all of them run as many micro-batches of one size."""
    return data_ranks * max(1, recipe.train.micro_batch_size)


def _check_smallest_batch(recipe: Recipe, grid: Grid) -> None:
    """It fills the pipeline, or PyTorch's schedule would refuse it in the first step, or years later."""
    parallel, train, least = recipe.parallel, recipe.train, least_micro_batches(recipe.parallel)
    sequences = Schedules(recipe).smallest_batch(sequences_at_once(recipe, grid.data))
    each = sequences // grid.data
    count = each // (train.micro_batch_size or each)
    if count < least:
        cure = f"train.micro_batch_size={max(1, each // least)}"
        if each < least:
            cure += f" and batches of at least {least * grid.data * train.seq_len} tokens"
        raise UserError(
            f"{sequences} sequences, the smallest batch of the schedule, are {count} micro-batches a rank, which do "
            f"not fill {parallel.pipeline} ranks of {parallel.schedule}: they need {least}, so take {cure}"
        )
