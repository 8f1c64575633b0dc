"""`baleen reason` on a network so small that it learns nothing: its table, its questions, its control, its going on."""

import json
import tomllib
from pathlib import Path

import pytest
from rich.console import Console
from tiny_stages import SFT, tiny_recipe

from baleen.align import reason, sft
from baleen.align.accuracy import HELDOUT_SEED
from baleen.align.pipeline import align
from baleen.align.recipe import AlignRecipe
from baleen.align.tasks import ChainSum, Sorting, distinct_questions
from baleen.config import UserError
from baleen.train.display import Display
from baleen.train.rundir import read_metrics
from baleen.train.schedule import Curve

RL = {
    "kind": "rl", "steps": 2, "questions": 3, "group_size": 4, "lr": 1e-3, "kl_coef": 0.0, "eval_questions": 5,
    "sampling": {"max_tokens": 8},
}  # fmt: skip


@pytest.mark.parametrize("task", [ChainSum(terms=(2, 3)), Sorting(numbers=(3, 5))], ids=lambda task: task.name)
def test_the_table_asks_what_nothing_has_looked_at(task, monkeypatch):
    monkeypatch.setattr(reason, "QUESTIONS", 100)
    monkeypatch.setattr(reason, "EVAL_QUESTIONS", 50)
    asked = {question.asked for question in reason.table_questions([task], eval_questions=150)}
    looked_at = {question.asked for question in distinct_questions([task], "test", HELDOUT_SEED, 150)}
    drawn = {question.asked for question in distinct_questions([task], "test", reason.TABLE_SEED, 250)}
    assert len(asked) == 100 and not asked & looked_at
    assert drawn & looked_at, "a task this small shows whether the overlap is left out"


@pytest.mark.slow
def test_three_models_in_one_summary_and_nothing_is_done_twice(tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    monkeypatch.setattr(reason, "QUESTIONS", 8)
    monkeypatch.setattr(reason, "EVAL_QUESTIONS", 8)
    console = Console(quiet=True)
    summary = reason.run_reason(tiny_recipe(SFT, RL), tmp_path / "reason", console)
    assert summary == json.loads((tmp_path / "reason/summary.json").read_text())
    for name in ("before", "after", "sft_control"):
        for key in (f"accuracy_{name}", f"accuracy_{name}_sampled"):
            low, high = summary[f"{key}_interval"]
            assert 0 <= low <= summary[key] <= high <= 1
        assert 0 < summary[f"answer_tokens_{name}"] <= 8
    assert summary["rl_steps"] == 2 and summary["rl_seconds"] > 0
    control = read_metrics(tmp_path / "reason-control")
    assert {row["stage"] for row in control} == {"sft"}
    again = reason.run_reason(tiny_recipe(SFT, RL), tmp_path / "reason", console)
    assert len(read_metrics(tmp_path / "reason-control")) == len(control)
    assert again["accuracy_after"] == summary["accuracy_after"]


def test_the_control_has_the_cold_start_s_schedule_over_its_own_clock():
    schedule = {"lr": [[0, 0.0], [16, 1.0], ["50%", 1.0], [640, 0.25]]}
    train = SFT["train"] | {"tokens": 320, "eval_every": 2}
    recipe = tiny_recipe(SFT | {"schedule": schedule, "train": train, "eval_samples": 2}, RL)
    whole = reason.control_recipe(recipe, Path("base"), 30.0)
    assert AlignRecipe.model_validate(tomllib.loads(whole.to_toml())) == whole  # as it is resumed
    control = whole.stages[0]
    lr = Curve(control.schedule.lr, control.train.tokens)
    assert control.train.tokens == reason.ENOUGH and control.train.minutes == 0.5
    assert [lr(share * reason.ENOUGH) for share in (0.025, 0.05, 0.5, 1.0)] == pytest.approx([0.5, 1.0, 1.0, 0.75])


def test_the_control_of_no_time_is_refused():
    with pytest.raises(UserError, match="the ledger has no RL of this run"):
        reason.control_recipe(tiny_recipe(SFT, RL), Path("base"), 0.0)


def test_recipes_of_other_stages_are_refused(tmp_path):
    with pytest.raises(UserError, match="an sft stage and then an rl stage"):
        reason.run_reason(tiny_recipe(SFT), tmp_path / "reason", Console(quiet=True))
    assert not (tmp_path / "reason").exists()


def test_the_plateau_is_of_drawn_answers_over_the_last_fifth():
    rows = [{"stage": "sft", "step": n, "heldout_accuracy": 0.0, "heldout_sampled": n / 100} for n in range(1, 11)]
    rows += [{"stage": "rl", "step": 11, "heldout_accuracy": 1.0}]
    assert reason.plateau_gain(rows) == pytest.approx(0.02)
    assert reason.plateau_gain([{"stage": "sft", "step": 1, "heldout_accuracy": 0.5}, *rows[10:]]) is None


def test_the_cold_start_looks_at_drawn_answers_too(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sft, "EVAL_QUESTIONS", 3)
    monkeypatch.setattr(sft, "EVAL_TOKENS", 8)
    drawn = sft.drawn_answers
    monkeypatch.setattr(sft, "drawn_answers", lambda *given, **keys: seen.append(keys) or drawn(*given, **keys))
    stage = SFT | {"eval_samples": 2, "train": SFT["train"] | {"eval_every": 2}}
    align(tiny_recipe(stage), tmp_path / "run", display=Display(quiet=True))
    looked = [row for row in read_metrics(tmp_path / "run") if "heldout_sampled" in row]
    assert [row["step"] for row in looked] == [2, 4] and all(0 <= row["heldout_sampled"] <= 1 for row in looked)
    assert [(keys["samples"], keys["seed"]) for keys in seen] == [(2, 0), (2, 0)]
