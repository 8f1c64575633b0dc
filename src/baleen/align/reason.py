"""`baleen reason`: does it reason after RL, and would more fine-tuning have done as well? One table, one summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from baleen.align.accuracy import HELDOUT_SEED, measure
from baleen.align.judge import Judge
from baleen.align.pipeline import Pipeline, align
from baleen.align.recipe import AlignRecipe, RLStage, SFTStage
from baleen.align.sft import EVAL_QUESTIONS
from baleen.align.tasks import Question, Task, distinct_questions
from baleen.config import UserError
from baleen.cost.account import StageRecord, find_run, read_ledger
from baleen.cost.figures import duration, usd
from baleen.cost.ledger import lab_of
from baleen.eval.report import write_report
from baleen.interop.load import load
from baleen.recipe import ScheduleConfig
from baleen.train.display import Display
from baleen.train.loop import run_stage
from baleen.train.precision import keep_freed_memory
from baleen.train.rundir import read_metrics, write_aside

QUESTIONS = 500  # unseen ones, the same for every model
TABLE_SEED = 20_250_120  # of these, apart from the held-out ones that curves and choices of settings have looked at
SAMPLES = 4  # of each question at temperature 1
ENOUGH = 10**12  # tokens: the control ends by the clock


def run_reason(recipe: AlignRecipe, run_dir: Path, console: Console) -> dict[str, Any]:
    """Cold start and RL by the recipe, then its control; writes summary.json. A run that was stopped goes on.

    The control is the cold start's stage once more from where the cold start ended, its schedule from the beginning,
    for as long by the clock as RL took. Raises UserError for a recipe whose stages are not these two.
    """
    if [stage.kind for stage in recipe.stages] != ["sft", "rl"]:
        raise UserError(
            "`baleen reason` compares RL with its start: the recipe needs an sft stage and then an rl stage"
        )
    keep_freed_memory()
    rl = recipe.stages[1]
    assert isinstance(rl, RLStage)
    asked = table_questions(rl.tasks or recipe.tasks, rl.eval_questions)  # raises now rather than after the training
    display = Display(quiet=console.quiet)
    done = align(recipe, run_dir, resume=(run_dir / "recipe.toml").is_file(), display=display)
    if done["status"] == "stopped":
        return done
    pipeline = Pipeline(recipe, run_dir, display)
    records = rl_records(run_dir)
    control_dir = run_dir.with_name(f"{run_dir.name}-control")
    control = control_recipe(recipe, pipeline.folder(0) / "model", sum(record_seconds(r) for r in records))
    stopped = align(control, control_dir, resume=(control_dir / "recipe.toml").is_file(), display=display)
    if stopped["status"] == "stopped":
        return stopped
    models = {"before": pipeline.folder(0), "after": run_dir, "sft_control": control_dir}
    with run_stage(recipe.cost, run_dir, "eval") as stage:
        measured = {name: measured_at(recipe, path, asked, display) for name, path in models.items()}
        drawn = sum(found["answer_tokens"] for found in measured.values()) * QUESTIONS * SAMPLES
        stage.progress(tokens=round(drawn), productive_seconds=stage.seconds)
    summary = summarise(run_dir, measured, records)
    write_aside(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    report = write_report(run_dir)
    tell(console, summary, measured, run_dir, report, asked[0].prompt)
    return summary


def control_recipe(recipe: AlignRecipe, base: Path, seconds: float) -> AlignRecipe:
    """More of the cold start's own fine-tuning, from its end, for so long. Raises UserError if that is no time."""
    if seconds <= 0:
        raise UserError("the ledger has no RL of this run, whose time the control would take: begin with another --run")
    cold = recipe.stages[0]
    assert isinstance(cold, SFTStage)
    train = cold.train.model_copy(update={"minutes": seconds / 60, "tokens": ENOUGH, "eval_every": 0})
    schedule = stretched(cold.schedule, ENOUGH / cold.train.tokens)
    stage = cold.model_copy(update={"train": train, "schedule": schedule, "eval_samples": 0})
    cost = recipe.cost.model_copy(update={"purpose": "ablation"})
    keys = {"name": f"{recipe.name}-control", "base": str(base.absolute()), "model": None, "stages": (stage,)}
    return recipe.model_copy(update={**keys, "cost": cost})


def stretched(schedule: ScheduleConfig, ratio: float) -> ScheduleConfig:
    """The same over `ratio` times as many tokens; knots at shares of them stand where they stood."""
    curves = {name: getattr(schedule, name) for name in ScheduleConfig.model_fields}
    knots = {
        name: tuple((when if isinstance(when, str) else when * ratio, *how) for when, *how in curve)
        for name, curve in curves.items()
    }
    return ScheduleConfig.model_validate(knots)


def rl_records(run_dir: Path) -> list[StageRecord]:
    """RL's rows of the ledger, one for each time it was begun or taken up again."""
    lab = lab_of(run_dir)
    return [record for record in read_ledger(lab).of_run(find_run(lab, run_dir)) if record.stage == "rl"]


def record_seconds(record: StageRecord) -> float:
    return record.device_seconds / record.devices


def measured_at(recipe: AlignRecipe, path: Path, asked: Sequence[Question], display: Display) -> dict[str, Any]:
    """Accuracy of the model at `path` on these questions."""
    rl = recipe.stages[1]
    assert isinstance(rl, RLStage)
    loaded = load(path)
    with Judge(sorted({question.verifier for question in asked}), rl.reward_seconds) as judge:
        found = measure(
            loaded.model, loaded.tokenizer, asked, judge, rl.sampling, samples=SAMPLES, seed=1, system=recipe.system
        )
        judge.close(display.warn)
    return found


def table_questions(tasks: Sequence[Task], eval_questions: int) -> list[Question]:
    """Questions for testing that nothing has looked at before: those of TABLE_SEED but for the held-out ones, of which
    the cold start looks at EVAL_QUESTIONS and RL at `eval_questions`.

    Raises UserError if there are not QUESTIONS of them.
    """
    looked_at = max(QUESTIONS, EVAL_QUESTIONS, eval_questions)
    seen = {question.asked for question in distinct_questions(tasks, "test", HELDOUT_SEED, looked_at)}
    drawn = distinct_questions(tasks, "test", TABLE_SEED, looked_at + QUESTIONS)
    fresh = [question for question in drawn if question.asked not in seen][:QUESTIONS]
    if len(fresh) < QUESTIONS:
        raise UserError(f"the tasks have only {len(fresh)} questions left to test on, {QUESTIONS} are wanted")
    return fresh


def plateau_gain(rows: list[dict[str, Any]], measure: str = "heldout_sampled") -> float | None:
    """How much held-out accuracy, of drawn answers, rose over the last fifth of the cold start; None if it was not
    looked at then.

    Of greedy ones (`heldout_accuracy`) it wavers: where two ways to answer are nearly as likely, these turn with every
    step.
    """
    sft = [row for row in rows if row["stage"] == "sft"]
    late = [row[measure] for row in sft if measure in row and row["step"] >= 0.8 * sft[-1]["step"]]
    return late[-1] - late[0] if len(late) > 1 else None


def summarise(run_dir: Path, measured: dict[str, dict[str, Any]], rl: list[StageRecord]) -> dict[str, Any]:
    """Flat, for machines: shares from 0 to 1, intervals of 95 %, seconds by the clock, USD."""
    summary: dict[str, Any] = {"questions": QUESTIONS, "samples": SAMPLES}
    for name, found in measured.items():
        for how, key in (("greedy", f"accuracy_{name}"), ("sampled", f"accuracy_{name}_sampled")):
            summary[key] = found[how]["value"]
            summary[f"{key}_interval"] = [found[how]["low"], found[how]["high"]]
        summary[f"answer_tokens_{name}"] = found["answer_tokens"]
        summary[f"votes_{name}"] = {k: share["value"] for k, share in found["votes"].items()}
    rows = read_metrics(run_dir)
    last = next(row for row in reversed(rows) if row["stage"] == "rl")
    points = 100 * (summary["accuracy_after"] - summary["accuracy_before"])
    spent = sum(record.usd for record in rl)
    return summary | {
        "plateau_gain": plateau_gain(rows),
        "plateau_gain_greedy": plateau_gain(rows, "heldout_accuracy"),
        "rl_steps": sum(row["stage"] == "rl" for row in rows),
        "rl_seconds": sum(record_seconds(record) for record in rl),
        "rl_seconds_by_part": {name: last[f"seconds_{name}"] for name in ("rollout", "reward", "update")},
        "rl_usd": spent,
        "usd_per_point": spent / points if points > 0 else None,
    }


def tell(
    console: Console, summary: dict[str, Any], measured: dict[str, Any], run_dir: Path, report: Path, ask: str
) -> None:
    table = Table(title=f"{QUESTIONS} unseen questions, 95 % intervals (Wilson)")
    for column in ("", "greedy", f"mean of {SAMPLES} at T = 1", f"majority of {SAMPLES}", "tokens an answer"):
        table.add_column(column, justify="left" if not column else "right")
    words = {
        "before": "cold start",
        "after": "after RL",
        "sft_control": f"control: {duration(summary['rl_seconds'])} more of SFT",
    }
    for name, found in measured.items():
        shares = (found["greedy"], found["sampled"], found["votes"][str(SAMPLES)])
        cells = [f"{s['value']:.1%}  [{s['low']:.1%}, {s['high']:.1%}]" for s in shares]
        table.add_row(words[name], *cells, f"{found['answer_tokens']:.1f}")
    console.print(table)
    gain, parts = summary["plateau_gain"], summary["rl_seconds_by_part"]
    if gain is not None:
        console.print(
            f"The cold start's last fifth of steps gained {100 * gain:+.1f} points on held-out questions at T = 1, "
            f"{100 * summary['plateau_gain_greedy']:+.1f} in greedy answers."
        )
    shares = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
    console.print(f"RL took {duration(summary['rl_seconds'])} ({shares}) and {usd(summary['rl_usd'])}.")
    if summary["usd_per_point"] is not None:
        console.print(f"What a point of accuracy cost: {usd(summary['usd_per_point'])}.")
    console.print(f"Ask it:   baleen chat {run_dir} --prompt '{ask}'\nCurves:   {report}", highlight=False)
