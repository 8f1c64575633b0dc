"""The lab's report as one self-contained HTML page that a manager can read: plotly's code is inside it."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from baleen.config import UserError
from baleen.cost.account import Account
from baleen.cost.card import NOT_RECORDED
from baleen.cost.figures import mass, quantity, signed_share, usd
from baleen.cost.report import SPENT_COLUMNS, ratio_text, report_sentences, spent_rows

PURPOSE_COLOURS = {"final": "#2563eb", "research": "#60a5fa", "ablation": "#a78bfa", "failed": "#ef4444"}
RECORDED_COLOURS = {"people": "#059669", "data": "#65a30d", "hardware": "#d97706", "other": "#6b7280"}


def write_page(report: dict[str, Any], account: Account, path: Path) -> None:
    """Write the page, aside and then renamed. Raises UserError if plotly is not installed or the path not writable."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        raise UserError("the HTML page needs plotly: pip install 'baleen-lm[report]'") from None
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    template = resources.files("baleen.cost").joinpath("data/report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"usd": usd, "quantity": quantity, "mass": mass, "error": signed_share, "ratio": ratio_text}
    charts = json.dumps(page_charts(report, account)).replace("<", "\\u003c")
    text = environment.from_string(template).render(
        report=report,
        sentences=report_sentences(report),
        spent_columns=SPENT_COLUMNS,
        spent=spent_rows(report),
        plotly=Markup(get_plotlyjs()),
        charts=Markup(charts),
    )
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; give another file to --html") from None


def page_charts(report: dict[str, Any], account: Account) -> list[dict[str, Any]]:
    """Plotly figures as plain data: {title, data, layout}."""
    names = [p["project"] for p in report["projects"]]
    bars = [
        _bar(
            f"compute: {name}", [p["purposes"].get(name, {}).get("usd", 0.0) for p in report["projects"]], names, colour
        )
        for name, colour in PURPOSE_COLOURS.items()
        if name in report["purposes"]
    ] + [
        _bar(name, [p["recorded"].get(name, 0.0) for p in report["projects"]], names, colour)
        for name, colour in RECORDED_COLOURS.items()
        if report["recorded"][name] != NOT_RECORDED
    ]
    times, total, totals = [stage.began.isoformat() for stage in account.stages[:1]], 0.0, [0.0]
    for stage in sorted(account.stages, key=lambda s: s.last):
        total += stage.usd
        times.append(stage.last.isoformat())
        totals.append(total)
    stages = report["stages"]
    return [
        {
            "title": "Dollars by project",
            "data": bars,
            "layout": {"barmode": "stack", "xaxis": {"title": {"text": "USD"}}, "height": 160 + 46 * len(names)},
        },
        {
            "title": "Compute dollars over time",
            "data": [{"type": "scatter", "mode": "lines+markers", "x": times, "y": totals, "line": {"shape": "hv"}}],
            "layout": {"yaxis": {"title": {"text": "USD"}}},
        },
        {
            "title": "Compute dollars by stage",
            "data": [{"type": "bar", "x": list(stages), "y": [entry["usd"] for entry in stages.values()]}],
            "layout": {"yaxis": {"title": {"text": "USD"}}},
        },
    ]


def _bar(name: str, values: list[float], projects: list[str], colour: str) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": values,
        "y": projects,
        "marker": {"color": colour},
        "hovertemplate": "%{y}: %{x:$,.4g}",
    }
