"""The commands of post-training: sft, rl, distill and reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

RecipeArgument = Annotated[str, typer.Argument(help="A recipe of stages: a .toml file, or the name of one that ships.")]
RunOption = Annotated[Path, typer.Option("--run", help="Directory of the run.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Override a key: stages.0.train.lr=1e-3.")]
BaseOption = Annotated[str, typer.Option("--base", help="The RUN to go on from, in place of the recipe's.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on where the run was stopped.")]
MaxStepsOption = Annotated[int | None, typer.Option("--max-steps", min=1, help="Stop after this many steps in all.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def add_to(app: typer.Typer) -> None:
    app.command()(sft)
    app.command()(rl)
    app.command()(distill)
    app.command()(reason)


def sft(
    recipe: RecipeArgument,
    run: RunOption,
    base: BaseOption = "",
    overrides: SetOption = [],  # noqa: B006 - typer wants a list
    max_steps: MaxStepsOption = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune on conversations: only the assistant's words are learnt."""
    _align("sft", recipe, run, base, overrides, max_steps, resume, as_json)


def rl(
    recipe: RecipeArgument,
    run: RunOption,
    base: BaseOption = "",
    overrides: SetOption = [],  # noqa: B006
    max_steps: MaxStepsOption = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Learn to reason from rewards by rules (GRPO), alone or as the stages of R1."""
    _align("rl", recipe, run, base, overrides, max_steps, resume, as_json)


def distill(
    recipe: RecipeArgument,
    run: RunOption,
    base: BaseOption = "",
    teacher: Annotated[str, typer.Option("--teacher", help="The RUN to learn from.")] = "",
    overrides: SetOption = [],  # noqa: B006
    max_steps: MaxStepsOption = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Teach a smaller model what a larger one says and gets right."""
    _align("distill", recipe, run, base, overrides, max_steps, resume, as_json, teacher)


def reason(
    run: RunOption = Path("runs/reason"),
    recipe: Annotated[str, typer.Option(help="A recipe of an sft and an rl stage.")] = "reason",
    overrides: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """It learns to reason: cold start, reinforcement learning and its control, in one table."""
    from rich.console import Console

    from baleen.align.reason import run_reason
    from baleen.align.recipe import load_align_recipe

    summary = run_reason(load_align_recipe(recipe, overrides), run, Console(stderr=as_json))
    if as_json:
        print(json.dumps(summary))


def _align(
    command: str,
    recipe: str,
    run: Path,
    base: str,
    overrides: list[str],
    max_steps: int | None,
    resume: bool,
    as_json: bool,
    teacher: str = "",
) -> None:
    from baleen.align.pipeline import align
    from baleen.align.recipe import for_command, load_align_recipe

    resolved = for_command(command, load_align_recipe(recipe, overrides), base, teacher)
    summary: dict[str, Any] = align(resolved, run, resume=resume, max_steps=max_steps)
    if as_json:
        print(json.dumps(summary))
        return
    for key, value in summary.items():
        sys.stdout.write(f"{key:18} {value:.4f}\n" if isinstance(value, float) else f"{key:18} {value}\n")
