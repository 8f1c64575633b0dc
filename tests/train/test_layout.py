"""What several processes cannot train is refused before any of them starts."""

import pytest

from baleen.config import UserError
from baleen.recipe import Recipe, load_recipe
from baleen.train.layout import check_layout


def recipe(config, train=None, ramp=((0, 1.0),), **parallel):
    keys = {"tokens": 1e6, "batch_tokens": 64 * 32, "seq_len": 64, "micro_batch_size": 1, "lr": 1e-3, **(train or {})}
    given = {"model": config.model_dump(), "train": keys, "parallel": parallel, "schedule": {"batch_tokens": ramp}}
    return Recipe.model_validate(given)


def test_every_batch_of_v3_fills_its_pipeline():
    grid = check_layout(load_recipe("v3-671b"), 2048)
    assert (grid.pipeline, grid.data) == (16, 128)
    says = "3072 sequences.* 24 micro-batches .*need 32, so take .* at least 16777216 tokens"
    with pytest.raises(UserError, match=says):
        check_layout(load_recipe("v3-671b", ["schedule.batch_tokens=[[0, 0.2], [1e9, 1.0]]"]), 2048)


@pytest.mark.parametrize(
    ("schedule", "needs"), [("1f1b", "micro_batch_size=4"), ("dualpipev", "micro_batch_size=2"), ("zbv", None)]
)
def test_one_micro_batch_does_not_fill_a_pipeline(tiny_config, schedule, needs):
    """8 sequences a rank, as one micro-batch, which is the default: ZBV alone takes it."""
    asked = recipe(tiny_config(num_hidden_layers=6), {"micro_batch_size": 0}, pipeline=2, schedule=schedule)
    if needs is None:
        assert check_layout(asked, 8).data == 4
        return
    with pytest.raises(UserError, match=f"are 1 micro-batches a rank.* so take train.{needs}$"):
        check_layout(asked, 8)
    assert check_layout(recipe(asked.model, {"micro_batch_size": 2}, pipeline=2, schedule=schedule), 8).data == 4


def test_the_smallest_batch_of_a_schedule_counts(tiny_config):
    asked = recipe(tiny_config(), None, [[0, 1.0], ["50%", 0.25], ["50%", 1.0]], pipeline=2)
    with pytest.raises(UserError, match="8 sequences, the smallest batch of the schedule, are 2 micro-batches"):
        check_layout(asked, 8)
    assert check_layout(asked, 4)


@pytest.mark.parametrize(
    ("train", "parallel", "says"),
    [
        ({"batch_tokens": 64 * 3}, {}, "take 256"),
        ({"eval_every": 5}, {}, "train.eval_every is for one process"),
        ({"optimizer": "muon"}, {}, "Muon needs whole matrices"),
        ({"precision": "fp8"}, {}, "train.precision=fp8 is for one process"),
        ({}, {"dispatch": "fp8"}, "set parallel.expert too"),
        ({}, {"pipeline": 2, "zero": 3}, "take parallel.zero=1"),
        ({}, {"pipeline": 4}, "take at most 4 stages"),
        ({}, {"expert": 3}, "the nearest that does is parallel.expert = 2"),
    ],
)
def test_what_does_not_go_together(tiny_config, train, parallel, says):
    with pytest.raises(UserError, match=says):
        check_layout(recipe(tiny_config(), train, **parallel), 4)


def test_one_matrix_at_both_ends_is_not_cut(tiny_config):
    with pytest.raises(UserError, match="take parallel.pipeline=1"):
        check_layout(recipe(tiny_config(tie_word_embeddings=True), pipeline=2), 4)


def test_one_process_trains_all_of_it(tiny_config):
    train = {"batch_tokens": 64 * 3, "eval_every": 5, "optimizer": "muon", "precision": "fp8", "micro_batch_size": 0}
    assert check_layout(recipe(tiny_config(), train), 1).world == 1
