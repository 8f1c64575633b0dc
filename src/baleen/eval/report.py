"""One run on one page: report.html, self-contained, made from the files of a run directory and nothing else.

Whatever those files hold is untrusted text. The template escapes all of it, and the page's policy forbids every fetch.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from baleen.config import ModelConfig, UserError, read_json
from baleen.cost import flops
from baleen.cost.architecture import from_model_config
from baleen.cost.card import card_notes, card_rows, cost_card
from baleen.cost.figures import duration, quantity, usd
from baleen.recipe import Recipe, load_recipe, recipe_sections

Row = dict[str, Any]
AXES = {"tokens": ("tokens", 1), "steps": ("step", 1), "minutes": ("seconds", 1 / 60)}  # shown: key, times
MAX_POINTS = 1500  # of a curve: more than a screen has columns
MAX_CELLS = 200_000  # of the heat map: what a phone still draws
MAX_SAMPLES = 12


class Panel(NamedTuple):
    """A chart: its lines are pairs of a key of metrics.jsonl and the name shown."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    smooth: bool = False
    from_zero: bool = True


PANELS = (
    Panel("Loss", "nats per token", (("loss", "next token"), ("mtp_loss", "token after it (MTP)")), True, False),
    Panel("Held-out evaluation", "bits per byte", (("heldout_bpb", "model"),), from_zero=False),
    Panel("Learning rate", "", (("lr", "learning rate"),)),
    Panel("Throughput", "tokens per second", (("tokens_per_second", "tokens per second"),), smooth=True),
    Panel("Gradient norm", "before clipping", (("grad_norm", "gradient norm"),), smooth=True),
    Panel("Load violation", "max / mean − 1", (("max_violation", "busiest expert, mean of layers"),), smooth=True),
)
REASONING_PANELS = (
    Panel("Reward", "mean of the answers", (("reward", "reward"),), smooth=True),
    Panel("Accuracy", "share", (("accuracy", "on training questions"), ("heldout_accuracy", "held out")), smooth=True),
    Panel("Length of answers", "tokens", (("answer_tokens", "tokens"),), smooth=True),
    Panel("Entropy and divergence", "nats per token", (("entropy", "entropy"), ("kl", "KL to the reference")), True),
    Panel(
        "Groups and cuts",
        "share",
        (("degenerate_groups", "groups without variance"), ("truncated", "answers cut off"), ("clipped", "clipped")),
    ),
    Panel("Rollout against training", "nats per token", (("logprob_gap", "mean gap of log-probabilities"),)),
)
REWARD_ROSE = 0.1  # of the reward's own range: then held-out accuracy should have risen too


def write_report(run_dir: Path) -> Path:
    """Writes run_dir/report.html from metrics.jsonl, recipe.toml, summary.json and the ledger; returns its path.

    What is missing or damaged leaves its section out and says so on the page. Raises UserError if `run_dir` holds no
    metrics, or plotly is not installed; a report that was there before then stays as it is.
    """
    plotly_js = _plotly_js()
    rows, notices = read_metrics(run_dir / "metrics.jsonl")
    recipe, recipe_text = _recipe(run_dir / "recipe.toml", notices)
    summary = _summary(run_dir / "summary.json", notices)
    card, card_missing = _card(run_dir)
    panels = [*PANELS, *(REASONING_PANELS if any("reward" in row for row in rows) else ())]
    notices += hacked_reward(rows)
    axes = [axis for axis, (key, _) in AXES.items() if all(_first_number(row.get(key)) is not None for row in rows)]
    samples = [row for row in rows if isinstance(row.get("sample"), str)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    template = environment.from_string(resources.files("baleen.eval").joinpath("report.html").read_text("utf-8"))
    html = template.render(
        name=run_dir.resolve().name,
        recipe_name=recipe.name if recipe else None,
        steps=rows[-1]["step"] if rows else 0,
        tiles=_tiles(rows, recipe, summary, card),
        notices=notices,
        panels=panels,
        data={
            "axes": axes,
            "panels": [_panel(panel, rows, axes, summary) for panel in panels],
            "load": _expert_load(rows, axes, recipe.model if recipe else None, notices),
        },
        samples=_spread(samples, MAX_SAMPLES),
        sample_count=len(samples),
        summary=summary,
        card=card,
        card_rows=card_rows(card) if card else [],
        card_stages=[(name, usd(spent)) for name, spent in card["stages"].items() if _is_number(spent)] if card else [],
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
        if not isinstance(row, dict) or type(row.get("step")) is not int or not _is_number(row["step"]):
            torn += 1
            continue
        not_finite += isinstance(row.get("loss"), float) and not math.isfinite(row["loss"])
        by_step[row["step"]] = row
    notices = []
    if torn:
        notices.append(f"{_times(torn, 'line')} left out of metrics.jsonl: torn or not understood.")
    if not_finite:
        notices.append(f"{_times(not_finite, 'step')} without a finite loss: the curve has a gap there.")
    return [by_step[step] for step in sorted(by_step)], notices


def hacked_reward(rows: list[Row]) -> list[str]:
    """A sentence if RL's reward rose and held-out accuracy did not: then the reward is earned some other way."""
    rl = [row for row in rows if _is_number(row.get("reward"))]
    seen = [row["heldout_accuracy"] for row in rl if _is_number(row.get("heldout_accuracy"))]
    if len(rl) < 2 or not seen:
        return []
    ends = max(1, len(rl) // 5)
    first, last = (sum(row["reward"] for row in part) / ends for part in (rl[:ends], rl[-ends:]))
    before = sum(row.get("accuracy", 0.0) for row in rl[:ends]) / ends
    spread = max(row["reward"] for row in rl) - min(0.0, min(row["reward"] for row in rl))
    if last - first <= REWARD_ROSE * spread or seen[-1] > before + 0.02:
        return []
    return [
        f"The reward rose from {first:.2f} to {last:.2f}, but held-out accuracy did not (it is {seen[-1]:.1%}): the "
        "reward is being earned in some other way than by right answers."
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


def _summary(path: Path, notices: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        summary = read_json(path)
    except UserError as error:
        notices.append(f"The summary was left out: {error}")
        return {}
    if not isinstance(summary, dict):
        notices.append("The summary was left out: summary.json holds no JSON object.")
        return {}
    return summary


def _card(run_dir: Path) -> tuple[dict[str, Any], str]:
    try:
        return cost_card(run_dir), ""
    except UserError as error:
        return {}, str(error)


def shown(value: Any) -> str:
    """A value of summary.json for people."""
    if value is None or isinstance(value, bool):
        return {None: "not recorded", True: "yes", False: "no"}[value]
    return quantity(value) if _is_number(value) else str(value)


class Tile(NamedTuple):
    title: str
    value: str
    beside: str = ""


def _tiles(rows: list[Row], recipe: Recipe | None, summary: Mapping[str, Any], card: Mapping[str, Any]) -> list[Tile]:
    tiles = []
    if recipe:
        shape = from_model_config(recipe.model)
        total, mtp = flops.parameters(shape)["total"], flops.mtp_parameters(shape)
        beside = f"{quantity(flops.active_parameters(shape))} active per token"
        tiles.append(Tile("Parameters", quantity(total), beside + (f", {quantity(mtp)} more for MTP" if mtp else "")))
    tokens = _first_number(summary.get("tokens_trained"), *_newest(rows, "tokens"))
    tiles.append(Tile("Tokens", "–" if tokens is None else quantity(tokens), "trained on"))
    seconds = _first_number(summary.get("train_seconds"), *_newest(rows, "seconds"))
    tiles.append(Tile("Time", "–" if seconds is None else duration(seconds), "of training"))
    bpb = _first_number(summary.get("heldout_bpb"), *_newest(rows, "heldout_bpb"))
    beaten = [f"{name} {value:.3f}" for name, value in _baselines(summary)]
    beside = "held out; " + (", ".join(beaten) or "lower is better")
    tiles.append(Tile("Bits per byte", "–" if bpb is None else f"{bpb:.3f}", beside))
    headline = _first_number(card.get("headline_usd"), summary.get("cost_headline_usd"))
    full = _first_number(card.get("full_usd"), summary.get("cost_full_usd"))
    tiles.append(Tile("Cost, headline", "–" if headline is None else usd(headline), "the final run alone"))
    ratio = f", {full / headline:.1f} × the headline" if full and headline else ""
    tiles.append(Tile("Cost, full", "–" if full is None else usd(full), "all of its project" + ratio))
    return tiles


def _newest(rows: list[Row], key: str) -> Iterator[Any]:
    return (row.get(key) for row in reversed(rows))


def _baselines(summary: Mapping[str, Any]) -> list[tuple[str, float]]:
    named = (("xz", _first_number(summary.get("xz_bpb"))), ("byte 6-gram", _first_number(summary.get("ngram_bpb"))))
    return [(name, value) for name, value in named if value is not None]


def _panel(panel: Panel, rows: list[Row], axes: list[str], summary: Mapping[str, Any]) -> dict[str, Any]:
    lines = []
    for key, name in panel.lines:
        held = [row for row in rows if _is_number(row.get(key))]
        if not held:
            continue
        y_N = _thin([row[key] if math.isfinite(row[key]) else math.nan for row in held], MAX_POINTS)
        line = {"name": name, "x": _x(held, axes, MAX_POINTS), "y": _json(y_N)}
        if panel.smooth and len(y_N) >= 60:
            line["smooth"] = _json(_moving_average(y_N, reach=len(y_N) // 60))
        lines.append(line)
    baselines = _baselines(summary) if panel.unit == "bits per byte" else []
    return {**panel._asdict(), "lines": lines, "baselines": baselines}


def _expert_load(
    rows: list[Row], axes: list[str], config: ModelConfig | None, notices: list[str]
) -> dict[str, Any] | None:
    """Load over the fair share at each moment, layers and experts in one axis; None if nothing was recorded.

    T moments, L MoE layers, E experts. A record of another shape than the last good one is left out and told.
    """
    recorded = [row for row in rows if "expert_load" in row]
    loads = [_load_LE(row["expert_load"]) for row in recorded]
    shape = next((load_LE.shape for load_LE in reversed(loads) if load_LE is not None), None)
    kept = [(row, load) for row, load in zip(recorded, loads, strict=True) if load is not None and load.shape == shape]
    if len(kept) < len(recorded):
        notices.append(
            f"{_times(len(recorded) - len(kept), 'record')} left out of the map of expert load: its shape is another."
        )
    if shape is None:
        return None
    layers, experts = shape
    moments = max(8, MAX_CELLS // (layers * experts))
    ratio_TLE = _thin(np.stack([load for _, load in kept]) * experts, moments)
    return {
        "x": _x([row for row, _ in kept], axes, moments),
        "layers": [_layer_name(index, config) for index in range(layers)],
        "experts": experts,
        "ratio": ratio_TLE.reshape(-1, layers * experts).round(3).tolist(),
    }


def _load_LE(value: Any) -> NDArray[np.float64] | None:
    try:
        load_LE = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return load_LE if load_LE.ndim == 2 and load_LE.size and ((load_LE >= 0) & (load_LE <= 1)).all() else None


def _layer_name(moe_index: int, config: ModelConfig | None) -> str:
    if config is None:
        return f"MoE layer {moe_index}"
    layer = config.first_k_dense_replace + moe_index
    return f"layer {layer}" if layer < config.num_hidden_layers else f"MTP {layer - config.num_hidden_layers + 1}"


def _x(rows: list[Row], axes: list[str], limit: int) -> dict[str, list[float | None]]:
    out = {}
    for axis in axes:
        key, times = AXES[axis]
        out[axis] = _json(_thin([row[key] * times for row in rows], limit), digits=12)
    return out


def _thin(values: ArrayLike, limit: int) -> NDArray[np.float64]:
    """At most `limit` values along the first axis, each the mean of its neighbours that are numbers."""
    values_N = np.asarray(values, np.float64)
    if len(values_N) <= limit:
        return values_N
    return np.stack([_mean(part) for part in np.array_split(values_N, limit)])


def _moving_average(y_N: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Mean of the points at most `reach` to either side; near the start fewer, as many left as right.

    So it does not lag behind the steep beginning of a loss, and does not end in the noise of the last point.
    """
    return np.array([_mean(y_N[i - min(i, reach) : i + min(i, reach) + 1]) for i in range(len(y_N))])


def _mean(part: NDArray[np.float64]) -> NDArray[np.float64]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of no number is nan, as it should be
        return np.nanmean(part, axis=0)


def _json(values_N: NDArray[np.float64], digits: int = 6) -> list[float | None]:
    """JSON has no nan; plotly draws null as a gap."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values_N]


def _spread(items: list[Row], limit: int) -> list[Row]:
    """At most `limit` of the items, evenly spaced, first and last among them."""
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _is_number(value: Any) -> bool:
    """True for what a float64 can hold, nan included. JSON's integers have no bound; booleans are no numbers."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _first_number(*values: Any) -> float | None:
    return next((value for value in values if _is_number(value) and math.isfinite(value)), None)


def _times(count: int, noun: str) -> str:
    return f"1 {noun} was" if count == 1 else f"{count:,} {noun}s were"
