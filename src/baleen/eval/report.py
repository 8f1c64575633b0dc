"""One run on one page: report.html, self-contained, made from the files of a run directory and nothing else.

Whatever those files hold is untrusted text. The template escapes all of it, and the page's policy forbids every fetch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from baleen.config import UserError, read_json
from baleen.cost import flops
from baleen.cost.architecture import from_model_config
from baleen.cost.card import card_notes, card_rows, cost_card
from baleen.cost.figures import duration, quantity, usd
from baleen.eval.charts import Row, baselines, charts, first_number, is_number, panels_of, times
from baleen.recipe import Recipe, load_recipe, recipe_sections

MAX_SAMPLES = 12
REWARD_ROSE = 0.1  # of the reward's own range: then held-out accuracy should have risen too


def write_report(run_dir: Path) -> Path:
    """Writes run_dir/report.html from metrics.jsonl, recipe.toml, results and the ledger; returns its path.

    Results are those of the demo (summary.json) or of `baleen train` (train.json), and of `baleen eval` (eval.json).
    What is missing or damaged leaves its section out and says so on the page. Raises UserError if `run_dir` holds no
    metrics, or plotly is not installed; a report that was there before then stays as it is.
    """
    plotly_js = _plotly_js()
    rows, notices = read_metrics(run_dir / "metrics.jsonl")
    recipe, recipe_text = _recipe(run_dir / "recipe.toml", notices)
    summary = _results(run_dir / "summary.json", notices) or _results(run_dir / "train.json", notices)
    evaluation = _results(run_dir / "eval.json", notices)
    evaluated = evaluation.get("bits_per_byte") if evaluation.get("heldout") is True else None
    heldout_bpb = first_number(summary.get("heldout_bpb"), evaluated, *_newest(rows, "heldout_bpb"))
    card, card_missing = _card(run_dir)
    panels = panels_of(rows)
    notices += hacked_reward(rows)
    samples = [row for row in rows if isinstance(row.get("sample"), str)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    template = environment.from_string(resources.files("baleen.eval").joinpath("report.html").read_text("utf-8"))
    html = template.render(
        name=run_dir.resolve().name,
        recipe_name=recipe.name if recipe else None,
        steps=rows[-1]["step"] if rows else 0,
        tiles=_tiles(rows, recipe, summary, heldout_bpb, card),
        notices=notices,
        panels=panels,
        data=charts(panels, rows, summary, recipe.model if recipe else None, notices),
        heldout_bpb=heldout_bpb,
        samples=_spread(samples, MAX_SAMPLES),
        sample_count=len(samples),
        summary=summary,
        evaluation=evaluation,
        card=card,
        card_rows=card_rows(card) if card else [],
        card_stages=[(name, usd(spent)) for name, spent in card["stages"].items() if is_number(spent)] if card else [],
        card_notes=card_notes(card) if card else "",
        card_missing=card_missing,
        recipe_text=recipe_text,
        plotly_js=Markup(plotly_js),
    )
    path, aside = run_dir / "report.html", run_dir / "report.html.part"
    aside.write_text(html, encoding="utf-8", errors="replace")  # a sample may hold half a surrogate pair
    os.replace(aside, path)
    return path


def read_metrics(path: Path) -> tuple[list[Row], list[str]]:
    """Rows of a metrics.jsonl by ascending step, the last one written if a step occurs twice; and what was wrong.

    A row is a JSON object with an integer `step`. Raises UserError if there is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: give the directory of a run that has trained")
    by_step: dict[int, Row] = {}
    torn = not_finite = 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or type(row.get("step")) is not int or not is_number(row["step"]):
            torn += 1
            continue
        not_finite += isinstance(row.get("loss"), float) and not math.isfinite(row["loss"])
        by_step[row["step"]] = row
    notices = []
    if torn:
        notices.append(f"{times(torn, 'line')} left out of metrics.jsonl: torn or not understood.")
    if not_finite:
        notices.append(f"{times(not_finite, 'step')} without a finite loss: the curve has a gap there.")
    return [by_step[step] for step in sorted(by_step)], notices


def hacked_reward(rows: list[Row]) -> list[str]:
    """A sentence if RL's reward rose and accuracy did not, of answers drawn alike: then it is earned some other way."""
    rl = [row for row in rows if is_number(row.get("reward"))]
    seen = [row["heldout_accuracy"] for row in rl if is_number(row.get("heldout_accuracy"))]
    if len(rl) < 2 or not seen:
        return []
    ends = max(1, len(rl) // 5)
    earned = [row["reward"] - row.get("reward_overlong", 0.0) for row in rl]  # shorter answers were asked for
    first, last = sum(earned[:ends]) / ends, sum(earned[-ends:]) / ends
    right = [sum(row.get("accuracy", 0.0) for row in part) / ends for part in (rl[:ends], rl[-ends:])]
    spread = max(earned) - min(0.0, *earned)
    if last - first <= REWARD_ROSE * spread or right[1] > right[0] + 0.02:
        return []
    return [
        f"The reward rose from {first:.2f} to {last:.2f}, but the share of right answers did not ({right[0]:.1%} to "
        f"{right[1]:.1%}; {seen[-1]:.1%} held out): the reward is being earned in some other way than by them."
    ]


def _plotly_js() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        raise UserError("a report needs the package plotly: pip install 'baleen-lm[report]'") from None
    return get_plotlyjs()


def _recipe(path: Path, notices: list[str]) -> tuple[Recipe | None, str | None]:
    if not path.is_file():
        return None, None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        if {"stages", "base"} & set(recipe_sections(path.parent)):  # shown, but its network comes from elsewhere
            return None, text
        return load_recipe(path), text
    except (UserError, UnicodeDecodeError) as error:
        notices.append(f"The recipe is shown as it stands, but could not be understood: {error}")
        return None, text


def _results(path: Path, notices: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except UserError as error:
        notices.append(f"{path.name} was left out: {error}")
        return {}


def _card(run_dir: Path) -> tuple[dict[str, Any], str]:
    try:
        return cost_card(run_dir), ""
    except UserError as error:
        return {}, str(error)


def shown(value: Any) -> str:
    """A value of summary.json for people."""
    if value is None or isinstance(value, bool):
        return {None: "not recorded", True: "yes", False: "no"}[value]
    return quantity(value) if is_number(value) else str(value)


class Tile(NamedTuple):
    title: str
    value: str
    beside: str = ""


def _tiles(
    rows: list[Row],
    recipe: Recipe | None,
    summary: Mapping[str, Any],
    heldout_bpb: float | None,
    card: Mapping[str, Any],
) -> list[Tile]:
    tiles = []
    if recipe:
        shape = from_model_config(recipe.model)
        total, mtp = flops.parameters(shape)["total"], flops.mtp_parameters(shape)
        beside = f"{quantity(flops.active_parameters(shape))} active per token"
        tiles.append(Tile("Parameters", quantity(total), beside + (f", {quantity(mtp)} more for MTP" if mtp else "")))
    tokens = first_number(summary.get("tokens_trained"), *_newest(rows, "tokens"))
    tiles.append(Tile("Tokens", "–" if tokens is None else quantity(tokens), "trained on"))
    seconds = first_number(summary.get("train_seconds"), *_newest(rows, "seconds"))
    tiles.append(Tile("Time", "–" if seconds is None else duration(seconds), "of training"))
    beaten = [f"{name} {value:.3f}" for name, value in baselines(summary)]
    beside = "held out; " + (", ".join(beaten) or "lower is better")
    tiles.append(Tile("Bits per byte", "–" if heldout_bpb is None else f"{heldout_bpb:.3f}", beside))
    headline = first_number(card.get("headline_usd"), summary.get("cost_headline_usd"))
    full = first_number(card.get("full_usd"), summary.get("cost_full_usd"))
    tiles.append(Tile("Cost, headline", "–" if headline is None else usd(headline), "the final run alone"))
    ratio = f", {full / headline:.1f} × the headline" if full and headline else ""
    tiles.append(Tile("Cost, full", "–" if full is None else usd(full), "all of its project" + ratio))
    return tiles


def _newest(rows: list[Row], key: str) -> Iterator[Any]:
    return (row.get(key) for row in reversed(rows))


def _spread(items: list[Row], limit: int) -> list[Row]:
    """At most `limit` of the items, evenly spaced, first and last among them."""
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]
