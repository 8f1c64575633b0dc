"""The command line. Each command imports what it needs when it is called, so that --help is instant.

Results go to stdout, progress and words to stderr. Exit code 0, 2 for a user's mistake, 1 for a failure of ours.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from baleen import cli_align, cli_cost

NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)

app = typer.Typer(
    name="baleen",
    help="The DeepSeek-V3 system, whole and at any size: train, chat, and know what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_cost.app, name="cost", help="What a training run will cost, and what it did cost.")

RecipeArgument = Annotated[str, typer.Argument(help="A recipe's .toml file, or the name of one that ships.")]
RunArgument = Annotated[Path, typer.Argument(help="A run directory, a Hugging Face model directory or a GGUF file.")]
RunOption = Annotated[Path, typer.Option("--run", help="Directory of the run.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Override a key of the recipe: section.key=value.")]
DataOption = Annotated[list[str], typer.Option("--data", help="Train on these files, folders or package:NAME instead.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")]
MaxStepsOption = Annotated[int | None, typer.Option("--max-steps", min=1, help="Stop after this many steps in all.")]
TrackOption = Annotated[str, typer.Option("--track", help="none, tensorboard, trackio or wandb.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="fp32, bf16, fp16, fp8 or fp8-ue8m0.")]
WeightsOption = Annotated[str | None, typer.Option("--weights", help="On a CPU: fp32, bf16, int8 or int4.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command()
def demo(
    run: RunOption = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(min=0.1, help="Training time at most.")] = 8.0,
    as_json: JsonOption = False,
) -> None:
    """Train a small V3 on human conversations, talk to it, and see what it cost: all in some ten minutes."""
    from rich.console import Console

    from baleen.demo import run_demo

    summary = run_demo(run, minutes, Console(stderr=as_json))
    if as_json:
        _print_json(summary)


@app.command()
def train(
    recipe: RecipeArgument,
    run: Annotated[Path | None, typer.Option("--run", help="Directory of the run.")] = None,
    data: DataOption = [],  # noqa: B006 - typer wants a list
    overrides: SetOption = [],  # noqa: B006
    max_steps: MaxStepsOption = None,
    resume: ResumeOption = False,
    track: TrackOption = "none",
    only: Annotated[str | None, typer.Option(help="Train the recipe's base on: its MTP layers (mtp) or all.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what each rank of --world would hold.")] = False,
    world: Annotated[int, typer.Option(min=1, help="Processes, for --dry-run.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Train a model from a recipe, or continue with --resume."""
    from baleen.config import UserError
    from baleen.recipe import load_recipe, read_recipe

    if dry_run:
        if run is not None or max_steps is not None or resume or track != "none" or only is not None:
            raise UserError("--dry-run only counts: leave out --run, --max-steps, --resume, --track and --only")
        from baleen.train.dryrun import dry_run_recipe

        counted = dry_run_recipe(load_recipe(recipe, overrides, data), world)
        _report(counted, as_json)
        if counted["disagree"]:
            print(f"error: cost plan does not count as the ranks do: {', '.join(counted['disagree'])}", file=sys.stderr)
            raise typer.Exit(1)
        return
    if world != 1:
        raise UserError("--world is for --dry-run: a real run has as many processes as torchrun starts")
    if run is None:
        raise UserError("where shall the run be kept? Give --run DIRECTORY")
    if only is not None:
        from baleen.train.continued import train_on
        from baleen.train.continued_recipe import ContinuedRecipe

        if track != "none":
            raise UserError("--track is not for --only: read metrics.jsonl in the run's directory")
        continued = read_recipe(ContinuedRecipe, recipe, overrides, data)
        summary = train_on(continued, run, only=only, resume=resume, max_steps=max_steps)  # type: ignore[arg-type]
        _write_results(run, summary)
        _report(summary, as_json)
        return
    from baleen.train.loop import train as run_training

    resolved = load_recipe(recipe, overrides, data)
    summary = run_training(resolved, run, resume=resume, max_steps=max_steps, track=track)  # type: ignore[arg-type]
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun started, one reports
        _write_results(run, summary)
        _report(summary, as_json)


@app.command("eval")
def evaluate(
    run: RunArgument,
    text: Annotated[
        list[Path], typer.Option("--text", help="Files or folders; default: the run's held-out text.")
    ] = [],  # noqa: B006
    tasks: Annotated[
        str, typer.Option(help="By commas: last-word, next-line, FILE.jsonl, lm-eval:NAME, lm-eval:FILE.yaml.")
    ] = "",
    samples: Annotated[int, typer.Option(min=1, help="Programs for each question that wants one: pass@k.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Bits per byte of a model on text, and its score in tasks; a run keeps them as eval.json."""
    from baleen.eval.run import evaluate_run, write_evaluation
    from baleen.recipe import cost_of, run_of

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    account: Callable[[], AbstractContextManager[Any]] = nullcontext
    owner = run_of(run)
    if owner is not None:  # else a model, not a run: no ledger is its own
        from baleen.train.loop import run_stage

        account = partial(run_stage, cost_of(owner), owner, "eval")
    result = evaluate_run(run, text, account, tasks=names, samples=samples, say=partial(print, file=sys.stderr))
    _report({key: value for key, value in result.items() if as_json or key != "tasks"}, as_json)
    if not as_json:
        for name, measured in result.get("tasks", {}).items():
            print(f"\n{name}")
            _report({f"  {metric}": value for metric, value in measured.items()}, as_json)
    if owner == run:  # not of model-ema, which would be taken for the run's own
        write_evaluation(run, result)


@app.command("chat")
def chat_(
    run: Annotated[
        Path | None, typer.Argument(help="A run, a Hugging Face directory, a GGUF file or `smollm2`.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One question: prints the answer and ends.")] = None,
    url: Annotated[str | None, typer.Option(help="Talk to a server instead, such as http://127.0.0.1:8000.")] = None,
    model: Annotated[str | None, typer.Option(help="Which of the server's models.")] = None,
    api_key: Annotated[str | None, typer.Option(help="The server's key, else that in BALEEN_API_KEY.")] = None,
    votes: Annotated[int, typer.Option(min=1, help="With --prompt: the majority of so many answers.")] = 1,
    thinking_budget: Annotated[int | None, typer.Option(min=0, help="Tokens of thought at most.")] = None,
    weights: WeightsOption = None,
) -> None:
    """Talk to a model, here or on a server."""
    from dataclasses import replace

    from rich.console import Console

    from baleen.config import UserError
    from baleen.data.document import Message
    from baleen.infer.chat import CHAT_PARAMS, Local, answer_by_vote, answer_once, asked, chat, params_of
    from baleen.infer.engine import Engine
    from baleen.infer.native.runner import fastest_runner
    from baleen.infer.parse import opens_reasoning
    from baleen.infer.thinking import ThinkingBudget
    from baleen.interop.load import load
    from baleen.recipe import recipe_sections
    from baleen.serve.remote import Remote

    if (run is None) == (url is None):
        raise UserError("chat takes either a RUN or a --url")
    if url is not None and (votes > 1 or thinking_budget is not None or weights is not None):
        raise UserError("--votes, --thinking-budget and --weights are for a RUN here: leave them out with --url")
    if run is not None and model is not None:
        raise UserError("--model is for a --url: a RUN is one model")
    if run is not None and api_key is not None:
        raise UserError("--api-key is for a --url: a RUN here wants no key")
    if votes > 1 and prompt is None:
        raise UserError("--votes is for one question: give it by --prompt")
    params, system = CHAT_PARAMS, ""
    if url is not None:
        partner = Remote(url, model, api_key or os.environ.get("BALEEN_API_KEY") or None)
    else:
        assert run is not None
        loaded, system = load(run), recipe_sections(run).get("system", "")  # as it was trained to be asked
        engine = Engine(loaded.model, loaded.tokenizer, runner=partial(fastest_runner, format=weights))  # type: ignore[arg-type]
        partner = Local(engine)
        params = params_of(loaded.path)
        if votes > 1 and params.temperature == 0:  # a vote needs answers that differ
            params = replace(params, temperature=CHAT_PARAMS.temperature)
        if thinking_budget is not None:
            tokenizer = loaded.tokenizer
            prompt_ids = tokenizer.encode_chat([Message("user", "")], add_generation_prompt=True)
            opened = opens_reasoning(tokenizer, prompt_ids)
            budget = ThinkingBudget(tokenizer, loaded.model.config.vocab_size, thinking_budget, opened=opened)
            params = replace(params, constraint=budget)
        if votes > 1 and prompt is not None:
            vote = answer_by_vote(engine, asked(prompt, system), sys.stdout, sys.stderr, votes, params)
            print(f"{vote.votes} of {vote.cast} answers agree", file=sys.stderr)
            return
    if prompt is None:
        chat(partner, Console(), params, system)
    else:
        answer_once(partner, asked(prompt, system), sys.stdout, sys.stderr, params)


@app.command()
def serve(
    runs: Annotated[list[str], typer.Argument(help="Runs, Hugging Face directories, GGUF files or `smollm2`.")],
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="BALEEN_API_KEY", help="What clients must send.")] = None,
    cors: Annotated[list[str], typer.Option(help="Origin of a web page elsewhere that may ask.")] = [],  # noqa: B006
    speculate: Annotated[bool, typer.Option(help="Let the MTP layers draft while it pays.")] = True,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers written at once.")] = 256,
    cache_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens that the cache of a model holds.")] = None,
    weights: WeightsOption = None,
    usd_per_device_hour: Annotated[float, typer.Option(min=0, help="For the bill; 0: recipe's or table's.")] = 0.0,
    max_body_bytes: Annotated[int, typer.Option(help="Of a request.")] = 8 * 2**20,
    max_prompt_tokens: Annotated[int, typer.Option(help="0: what the model's context holds.")] = 0,
    max_choices: Annotated[int, typer.Option(help="Answers of one request: n times its prompts.")] = 64,
    max_queue: Annotated[int, typer.Option(help="Answers that wait.")] = 1024,
    queue_seconds: Annotated[float, typer.Option(help="How long they wait at most.")] = 60.0,
    request_seconds: Annotated[float, typer.Option(help="How long a request's answers take at most.")] = 600.0,
    grace_seconds: Annotated[float, typer.Option(help="What answers get when the server is told to stop.")] = 20.0,
) -> None:
    """Serve models to browsers and to every program that speaks the OpenAI API."""
    from baleen.serve.limits import Limits
    from baleen.serve.server import Address
    from baleen.serve.server import serve as run_server

    limits = Limits(
        body_bytes=max_body_bytes,
        prompt_tokens=max_prompt_tokens,
        choices=max_choices,
        queue=max_queue,
        queue_seconds=queue_seconds,
        request_seconds=request_seconds,
        grace_seconds=grace_seconds,
    )
    run_server(
        runs,
        Address(host, port, api_key, tuple(cors)),
        limits,
        speculate="auto" if speculate else 0,
        max_batch=max_batch,
        cache_tokens=cache_tokens,
        weights=weights,  # type: ignore[arg-type]
        usd_per_device_hour=usd_per_device_hour,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )


@app.command()
def report(run: RunArgument) -> None:
    """Write report.html: curves, expert load, samples and cost of a run on one page."""
    from baleen.eval.report import write_report

    print(write_report(run))


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A Hugging Face deepseek_v3 directory or a deepseek2 GGUF file.")],
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    dtype: DtypeOption = None,
) -> None:
    """Bring a checkpoint in: any sharding, stacked or single experts, FP8 blocks."""
    from baleen.interop.convert import import_checkpoint

    print(import_checkpoint(source, out, dtype=dtype))


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(help="A new directory, or a new file OUT.gguf.")],
    to: Annotated[
        str,
        typer.Option(
            help="hf: for transformers, vLLM, SGLang (if exactly upcycled, transformers alone); gguf: for llama.cpp."
        ),
    ] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="hf: fp32, bf16, fp16, fp8 or fp8-ue8m0; gguf: f32, f16, bf16, q8_0 or q4_1.")
    ] = None,
) -> None:
    """Hand a model on to other engines."""
    from baleen.interop.convert import export_checkpoint, serving_caveat

    print(export_checkpoint(run, out, to=to, dtype=dtype))
    if to == "hf" and (caveat := serving_caveat(out)):
        print(f"warning: {caveat}", file=sys.stderr)


@app.command()
def upcycle(
    source: Annotated[str, typer.Argument(help="A Llama-family Hugging Face directory or GGUF file.")],
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    experts: Annotated[int, typer.Option(help="Copies of the routed part of each feed-forward network.")] = 1,
    slices: Annotated[int, typer.Option(help="Routed slices a copy; 0 keeps the network dense.")] = 0,
    shared: Annotated[int, typer.Option(help="Slices that always run.")] = 0,
    mtp: Annotated[int, typer.Option(help="MTP layers, to be trained.")] = 0,
    portable: Annotated[bool, typer.Option("--portable", help="Plain rope, no biases: nearly the same.")] = False,
    value_rank: Annotated[int | None, typer.Option(help="Coordinates of values in the latent.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
) -> None:
    """Turn a Llama-family model into a V3-architecture one that computes the same function."""
    from baleen.interop.upcycle import upcycle as convert

    made = convert(
        source, out, experts=experts, slices=slices, shared=shared, mtp=mtp,
        portable=portable, value_rank=value_rank, dtype=dtype,
    )  # fmt: skip
    print(made)


@app.command()
def recipes() -> None:
    """The recipes that ship with Baleen, and what each is for."""
    from baleen.recipe import recipe_lines

    for name, line in recipe_lines().items():
        print(f"{name:14} {line}")


cli_align.add_to(app)


def _report(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(result)
        return
    for key, value in result.items():
        print(f"{key:18} {value:.4f}" if isinstance(value, float) else f"{key:18} {value}")


def _write_results(run: Path, summary: dict[str, Any]) -> None:
    from baleen.train.rundir import write_aside

    write_aside(run / "train.json", json.dumps(summary, indent=2) + "\n")


def _print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result))


def main() -> None:
    """Runs the command line; a UserError becomes one sentence on stderr and exit code 2, a RankLost one and 1."""
    try:
        app()
    except ValueError as error:
        from baleen.config import UserError  # here, for it brings pydantic with it

        if not isinstance(error, UserError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            told = f"no space left on the disk ({error}): free some and run the command again"
        elif error.errno in NOT_ALLOWED and error.filename:
            told = f"{error.filename}: {error.strerror}: name another place, or change its owner or rights"
        else:
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        from baleen.parallel.ranks import RankLost  # here, for it brings torch with it

        if not isinstance(error, RankLost):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
