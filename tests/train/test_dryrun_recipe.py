"""The dry run of a recipe, beside the cost engine's formulas."""

import json
import resource
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from baleen.cli import app
from baleen.config import UserError
from baleen.recipe import Recipe
from baleen.train import dryrun
from baleen.train.dryrun import TOLERANCES, dry_run_recipe

pytestmark = pytest.mark.slow
V3 = ["norm", "up_projection", "swiglu"]
# large enough that indices and the like are no 2 % of what is kept
WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "q_lora_rank": 96, "kv_lora_rank": 64,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "num_hidden_layers": 6, "vocab_size": 1000,
}  # fmt: skip


def recipe(config, **parallel):
    train = {"tokens": 1e6, "batch_tokens": 64 * 2 * 16, "seq_len": 64, "micro_batch_size": 1, "lr": 1e-3}
    return Recipe.model_validate({"model": config.model_dump(), "train": train, "parallel": parallel})


@pytest.mark.parametrize(
    "parallel",
    [
        {"expert": 2}, {"pipeline": 2, "expert": 2}, {"zero": 0}, {"shard": 2, "expert": 2}, {"zero": 2},
        {"expert": 2, "recompute": V3}, {"pipeline": 2, "recompute": V3},
    ],
)  # fmt: skip
def test_what_a_rank_holds_and_sends_is_the_cost_engines(tiny_config, parallel):
    told = dry_run_recipe(recipe(tiny_config(**WIDE), **parallel), 4)
    assert told["disagree"] == []
    for word, tolerance in TOLERANCES.items():
        held = told["cost"][word]
        assert held["formula"] == pytest.approx(held["counted"], rel=tolerance, abs=0), word
        assert held["counted"] > 0 or (word == "all_to_all" and "expert" not in parallel)
    under_way = 5 / 2 if "pipeline" in parallel else 1  # DualPipeV: one more than the stages, of two a rank
    handed_on = 64 * WIDE["hidden_size"] * 4 if "pipeline" in parallel else 0  # a sequence's hidden states
    for rank, at_ends in zip(told["ranks"], (1, 2), strict=False):  # the first rank has both ends of the pipeline
        assert rank["inputs"] == rank["returned"] == at_ends * handed_on
    held = [
        rank["step_weights"] + rank["step_gradients"] + rank["optimizer"] + under_way * rank["kept"]
        + (16 - under_way) * rank["inputs"] + 16 * rank["returned"]  # buffers for a step's 16 micro-batches
        for rank in told["ranks"]
    ]  # fmt: skip
    assert told["fullest_rank_bytes"] == max(held)


def test_an_average_and_the_largest_step_are_held(tiny_config):
    def fullest(schedule=(), **train):
        asked = recipe(tiny_config(**WIDE), pipeline=2).model_dump()
        asked["train"] |= train
        asked["schedule"]["batch_tokens"] = schedule or asked["schedule"]["batch_tokens"]
        return dry_run_recipe(Recipe.model_validate(asked), 4)

    plain, averaged = fullest(), fullest(ema_decay=0.9)
    grown = averaged["fullest_rank_bytes"] - plain["fullest_rank_bytes"]
    assert grown in [rank["weights"] for rank in plain["ranks"]]
    twice = fullest(schedule=[[0, 0.5], ["50%", 2.0]])["fullest_rank_bytes"]
    assert twice == fullest(batch_tokens=2 * 64 * 2 * 16)["fullest_rank_bytes"] > plain["fullest_rank_bytes"]


def test_activations_without_a_formula_are_not_held(tiny_config):
    told = dry_run_recipe(recipe(tiny_config(), recompute=["swiglu"]), 4)
    assert "activations" not in told["cost"] and told["disagree"] == []


@pytest.mark.parametrize("word", ["parameters", "all_to_all", "data", "activations"])
def test_a_formula_that_is_off_ends_in_an_error(tiny_config, tmp_path, monkeypatch, word):
    formulas = dryrun._formulas
    monkeypatch.setattr(dryrun, "_formulas", lambda *a, **k: (f := formulas(*a, **k)) | {word: 1.05 * f[word]})
    file = tmp_path / "recipe.toml"
    file.write_text(recipe(tiny_config(**WIDE), expert=2).to_toml())
    done = CliRunner().invoke(app, ["train", str(file), "--dry-run", "--world", "4", "--json"])
    assert done.exit_code == 1 and done.stderr.endswith(f"does not count as the ranks do: {word}\n")
    assert json.loads(done.stdout)["cost"][word]["relative_error"] == pytest.approx(0.05, abs=0.02)


def test_a_batch_that_does_not_fill_the_pipeline_is_impossible(tiny_config):
    with pytest.raises(UserError, match="do not fill 4 ranks of dualpipev"):
        dry_run_recipe(recipe(tiny_config(num_hidden_layers=8), pipeline=4, expert=1), 64)


def test_what_training_would_refuse_is_refused(tiny_config):
    asked = recipe(tiny_config())
    odd = asked.model_copy(update={"train": asked.train.model_copy(update={"optimizer": "muon"})})
    with pytest.raises(UserError, match="Muon needs whole matrices"):
        dry_run_recipe(odd, 4)


def test_v3_on_2048_ranks_within_ten_minutes_and_20_gb():
    """The command itself, in a process whose memory is known; of 2,048 ranks the 16 that differ are counted."""
    command = [sys.executable, "-m", "baleen", "train", "v3-671b", "--dry-run", "--world", "2048", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["grid"] == {"pipeline": 16, "replicate": 1, "share": 2, "expert": 64}
    assert [rank["rank"] for rank in told["ranks"]] == list(range(0, 2048, 128))
    assert told["disagree"] == [] and told["cost"]["parameters"]["counted"] > 682e9
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 20e9  # of the largest child so far
