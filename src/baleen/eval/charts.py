"""What the report draws: curves and the map of expert load, thinned to what a screen can show."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from baleen.config import ModelConfig

Row = dict[str, Any]
AXES = {"tokens": ("tokens", 1), "steps": ("step", 1), "minutes": ("seconds", 1 / 60)}  # shown: key, times
MAX_POINTS = 1500  # of a curve: more than a screen has columns
MAX_CELLS = 200_000  # of the heat map: what a phone still draws


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


def panels_of(rows: list[Row]) -> list[Panel]:
    """Those of training, and of reasoning where there are rewards."""
    return [*PANELS, *(REASONING_PANELS if any("reward" in row for row in rows) else ())]


def charts(
    panels: list[Panel], rows: list[Row], summary: Mapping[str, Any], config: ModelConfig | None, notices: list[str]
) -> dict[str, Any]:
    """{axes, panels, load} as the page's script wants them; what is left out is added to the notices."""
    axes = [axis for axis, (key, _) in AXES.items() if all(first_number(row.get(key)) is not None for row in rows)]
    return {
        "axes": axes,
        "panels": [_panel(panel, rows, axes, summary) for panel in panels],
        "load": _expert_load(rows, axes, config, notices),
    }


def baselines(summary: Mapping[str, Any]) -> list[tuple[str, float]]:
    named = (("xz", first_number(summary.get("xz_bpb"))), ("byte 6-gram", first_number(summary.get("ngram_bpb"))))
    return [(name, value) for name, value in named if value is not None]


def _panel(panel: Panel, rows: list[Row], axes: list[str], summary: Mapping[str, Any]) -> dict[str, Any]:
    lines = []
    for key, name in panel.lines:
        held = [row for row in rows if is_number(row.get(key))]
        if not held:
            continue
        y_N = _thin([row[key] if math.isfinite(row[key]) else math.nan for row in held], MAX_POINTS)
        line = {"name": name, "x": _x(held, axes, MAX_POINTS), "y": _json(y_N)}
        if panel.smooth and len(y_N) >= 60:
            line["smooth"] = _json(_moving_average(y_N, reach=len(y_N) // 60))
        lines.append(line)
    beaten = baselines(summary) if panel.unit == "bits per byte" else []
    return {**panel._asdict(), "lines": lines, "baselines": beaten}


def _expert_load(
    rows: list[Row], axes: list[str], config: ModelConfig | None, notices: list[str]
) -> dict[str, Any] | None:
    """Load over the fair share at each moment, layers and experts in one axis; None if nothing was recorded.

    T moments, L MoE layers, E experts. A record with another number of experts than the last good one is left out and
    told. MTP layers, which come last, are not in the records of steps that give their loss no weight: null there.
    """
    recorded = [row for row in rows if "expert_load" in row]
    loads = [_load_LE(row["expert_load"]) for row in recorded]
    good = [(row, load_LE) for row, load_LE in zip(recorded, loads, strict=True) if load_LE is not None]
    experts = good[-1][1].shape[1] if good else 0
    kept = [(row, load_LE) for row, load_LE in good if load_LE.shape[1] == experts]
    if len(kept) < len(recorded):
        notices.append(
            f"{times(len(recorded) - len(kept), 'record')} left out of the map of expert load: its shape is another."
        )
    if not kept:
        return None
    layers = max(len(load_LE) for _, load_LE in kept)
    load_TLE = np.full((len(kept), layers, experts), math.nan)
    for record_LE, (_, load_LE) in zip(load_TLE, kept, strict=True):
        record_LE[: len(load_LE)] = load_LE
    moments = max(8, MAX_CELLS // (layers * experts))
    ratio_TLE = _thin(load_TLE * experts, moments)
    return {
        "x": _x([row for row, _ in kept], axes, moments),
        "layers": [_layer_name(index, config) for index in range(layers)],
        "experts": experts,
        "ratio": [_json(ratio_N) for ratio_N in ratio_TLE.reshape(-1, layers * experts).round(3)],
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


def is_number(value: Any) -> bool:
    """True for what a float64 can hold, nan included. JSON's integers have no bound; booleans are no numbers."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def first_number(*values: Any) -> float | None:
    return next((value for value in values if is_number(value) and math.isfinite(value)), None)


def times(count: int, noun: str) -> str:
    return f"1 {noun} was" if count == 1 else f"{count:,} {noun}s were"
