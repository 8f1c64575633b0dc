"""docs/evidence.md with its plots, and the table in the README, from the rows and from nothing else."""

from __future__ import annotations

import statistics
from pathlib import Path

from claim import Notebook, Row, interval, times
from measures import BEFORE, SPIKE
from plot import Effect, intervals, losses_by_size
from sizes import all_sizes, by_size, page_of_sizes
from studies import STUDIES, read_study, studies_done

BEGIN, END = "<!-- made by evidence/notebook.py --page -->", "<!-- end -->"
INTRODUCTION = """\
Which of V3's claims hold at a size that a laptop can run. Made by `python evidence/notebook.py --page` from
`evidence/rows`, not edited by hand; `make evidence` runs what is missing, `make evidence-quick` two rows again. The
command under a claim runs those of its rows that are missing: to measure one anew, take its files out of
`evidence/rows`.

Every row is one arm with one seed, from the same start (`evidence/base.toml`: 5M parameters, hidden 192, 4 layers,
589,824 tokens of conversations) unless its claim says otherwise. The arms of a claim are paired by seed: one order of
data and, where their networks are alike, one start. They have equal tokens unless an arm says otherwise. Differences
are relative to the first arm, those of shares in points; ± is the 95 % interval by Student's t, wide over so few seeds,
and each claim's own: of so many, one or so stands out by chance. Learning rates are tuned once a family, by one seed,
on the same held-out text, and a best rate at the edge of its grid is refused. Seconds are those of all steps of an arm,
of the median step when all arms take turns with nothing beside them (`python evidence/times.py`); in brackets, the mean
of the turns' ratios to the first arm, which need not be the quotient of the medians. *Holds* and *does not hold*
mean: beyond that interval, at this size, on this text.
"""
STEPS_OF_A_SPIKE = 5
WIDEST = 8  # columns of measures
OLMO = 0.822  # of Olmo 3's 8.34M GPU-hours: development (arXiv 2605.01158)
DEMO = 0.2384  # device-hours of `make demo`, its final run alone: train_seconds of two threads in README's table
ALLOWED = 10.0  # device-hours: five hours of two cores


def write_pages(notebook: Notebook, root: Path) -> None:
    """docs/evidence.md, docs/evidence/*.svg and the README's table."""
    plots = root / "docs" / "evidence"
    plots.mkdir(exist_ok=True)
    for file in plots.glob("*.svg"):
        file.unlink()
    for name, text in drawn(notebook).items():
        (plots / f"{name}.svg").write_text(text, encoding="utf-8")
    (root / "docs" / "evidence.md").write_text(page(notebook), encoding="utf-8")
    readme = root / "README.md"
    readme.write_text(with_summary(readme.read_text(encoding="utf-8"), notebook), encoding="utf-8")


def with_summary(readme: str, notebook: Notebook) -> str:
    assert BEGIN in readme and END in readme.partition(BEGIN)[2], "the README has lost the place of the table"
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{summary(notebook)}{END}{after}"


def claims_of(notebook: Notebook) -> list[str]:
    return [name for name, claim in notebook.claims.items() if claim.expects != "least"]


def summary(notebook: Notebook) -> str:
    """What holds, in one line a claim."""
    lines = ["| Claim | Seen here | Verdict |", "|---|---|---|"]
    for name in claims_of(notebook):
        lines.append(f"| {notebook.claims[name].says} | {_effect(notebook, name)} | {notebook.verdict(name)} |")
    spikes, rows = len(_spikes(notebook)), len(notebook.all_rows())
    seen = f"spikes in {spikes} of {rows} rows, {_skipped(notebook)} steps skipped" if rows else ""
    lines.append(f"| No spike of the loss that lasts, and no step skipped | {seen} | {_spike_verdict(notebook)} |")
    return "\n".join([*lines, ""])


def _effect(notebook: Notebook, name: str) -> str:
    claim, arms = notebook.claims[name], list(notebook.claims[name].arms)
    if not notebook.complete(name):
        return ""
    return f"{claim.measure} {_gap(notebook, name, arms[1])}"


def _gap(notebook: Notebook, name: str, arm: str) -> str:
    mean, half = interval(notebook.gaps(name, arm))
    return (
        f"{100 * mean:+.1f} ± {100 * half:.1f} points"
        if notebook.claims[name].absolute
        else f"{mean:+.2%} ± {half:.2%}"
    )


def drawn(notebook: Notebook) -> dict[str, str]:
    """Plots by name: those that there are rows for."""
    plots = {}
    for name in claims_of(notebook):
        if notebook.complete(name):
            arms = list(notebook.claims[name].arms)[1:]
            plots[name] = intervals([Effect(arm, *interval(notebook.gaps(name, arm))) for arm in arms])
    if all_sizes(notebook):
        plots["sizes"] = losses_by_size(by_size(notebook), "active parameters", "held-out bits per byte")
    return plots


def page(notebook: Notebook) -> str:
    lines = [
        "# Evidence",
        "",
        INTRODUCTION,
        summary(notebook),
        page_of_claims(notebook),
    ]
    lines += page_of_sizes(notebook)
    for name, study in STUDIES.items():
        lines += read_study(name, study, notebook.folder)
    lines += _sweeps(notebook) + _no_spike(notebook) + _account(notebook)
    return "\n".join(lines)


def page_of_claims(notebook: Notebook) -> str:
    return "\n".join(line for name in claims_of(notebook) for line in _section(notebook, name))


def _section(notebook: Notebook, name: str) -> list[str]:
    claim = notebook.claims[name]
    lines = [f"## {claim.says}", "", f"The paper: {claim.paper}. Here: **{notebook.verdict(name)}**.", ""]
    if claim.notes:
        lines += [claim.notes, ""]
    if machines := _machines(notebook, name):
        lines += [
            f"The arms ran on different machines ({machines}), which is another draw: one recipe and seed were seen to "
            "differ by 0.7 % so.",
            "",
        ]
    if not notebook.complete(name):
        return lines
    measures = list(dict.fromkeys((claim.measure, *claim.shows)))
    seconds = notebook.run_seconds(name) if claim.timed else None
    columns = [*measures, *(["seconds"] if claim.timed else [])]
    table = [["arm", "difference", *columns]]
    for number, arm in enumerate(claim.arms):
        gap = _gap(notebook, name, arm) if number else ""
        values = [_mean(notebook, name, arm, measure) for measure in measures]
        if claim.timed:
            values.append(_seconds(seconds, arm) if seconds else "not timed")
        table.append([arm, gap, *values])
    wide = len(columns) > WIDEST  # then the arms stand side by side
    head, *rows = zip(*table, strict=True) if wide else table
    words = 1 if wide else 2  # columns before the numbers
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * words + "---:|" * (len(head) - words)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", f"{len(claim.seeds)} seeds; `python evidence/notebook.py {name}`.", ""]
    return [*lines, f"![Differences](evidence/{name}.svg)", ""]


def _machines(notebook: Notebook, name: str) -> str:
    """Of the two arms that the verdict compares, where they do not share one machine; else nothing."""
    first, second = list(notebook.claims[name].arms)[:2]
    found: dict[str, None] = {}
    for seed in notebook.claims[name].seeds:
        rows = [notebook.row(name, arm, seed) for arm in (first, second)]
        machines = [row["machine"] for row in rows if row is not None]
        if len(set(machines)) > 1:
            found |= dict.fromkeys(machines)
    return " and ".join(found)


def _seconds(seconds: dict[str, list[float]], arm: str) -> str:
    first, own = next(iter(seconds.values())), seconds[arm]
    mean, half = times(first, own)
    return f"{statistics.median(own):.0f}" + ("" if own is first else f" ({mean:.2f} ± {half:.2f} ×)")


def _mean(notebook: Notebook, name: str, arm: str, measure: str) -> str:
    rows = [notebook.row(name, arm, seed) for seed in notebook.claims[name].seeds]
    values = [row["measured"][measure] for row in rows if row is not None and measure in row["measured"]]
    if not values:
        return ""  # a dense network has no nodes, one without MTP no acceptance
    mean, half = interval(values)
    if len(set(values)) == 1:
        return f"{mean:,.0f}" if mean >= 100 else f"{mean:.4f}"
    return f"{mean:,.0f} ± {half:,.0f}" if mean >= 100 else f"{mean:.4f} ± {half:.4f}"


def _sweeps(notebook: Notebook) -> list[str]:
    lines = ["## Learning rates", "", "| family | rates: held-out bits per byte | |", "|---|---|---|"]
    for name, claim in notebook.claims.items():
        if claim.expects == "least":
            tried = ", ".join(f"{arm}: {_mean(notebook, name, arm, claim.measure) or 'not run'}" for arm in claim.arms)
            lines.append(f"| {claim.says} | {tried} | {notebook.verdict(name)} |")
    return [*lines, ""]


def _spikes(notebook: Notebook) -> list[Row]:
    return [row for row in notebook.all_rows() if row["measured"]["longest_spike"] >= STEPS_OF_A_SPIKE]


def _skipped(notebook: Notebook) -> int:
    return sum(row["measured"]["skipped"] for row in notebook.all_rows())


def _spike_verdict(notebook: Notebook) -> str:
    if not notebook.all_rows():
        return "not run yet"
    return "does not hold" if _spikes(notebook) or _skipped(notebook) else "none seen"


def _no_spike(notebook: Notebook) -> list[str]:
    rows = notebook.all_rows()
    lines = ["## No spike", ""]
    if not rows:
        return [*lines, "No rows yet.", ""]
    worst = max(rows, key=lambda row: row["measured"]["largest_jump"])
    jump, where = worst["measured"]["largest_jump"], f"{worst['claim']}, {worst['arm']}, seed {worst['seed']}"
    return [
        *lines,
        f"In {len(_spikes(notebook))} of {len(rows)} rows the loss stays more than {SPIKE} nats above the median of",
        f"the {BEFORE} steps before, for {STEPS_OF_A_SPIKE} or more: **{_spike_verdict(notebook)}**. The largest",
        f"jump of a step is {jump:.3f} nats ({where}), mostly that of a hard batch; {_skipped(notebook)} steps were",
        "skipped. The paper reports no spike that could not be recovered from, and no rollback.",
        "",
    ]


def _account(notebook: Notebook) -> list[str]:
    """What the notebook took, by the ledger, beside a final model and another project's research."""
    timing, gone = notebook.timing(), notebook.superseded()
    rows = [*notebook.all_rows(), *([timing] if timing else []), *studies_done(notebook.folder)]
    lines = ["## What this notebook cost", ""]
    if not rows:
        return [*lines, "Nothing yet.", ""]
    hours, usd = sum(row["device_hours"] for row in rows), sum(row["usd"] for row in rows)
    research = hours + gone["device_hours"]
    longest = max((row["device_hours"] for row in notebook.all_rows()), default=0.0)
    dates = sorted({row["date"] for row in rows})
    machines = sorted({row["machine"] for row in rows})
    return [
        *lines,
        "| | rows | device-hours | USD |", "|---|---:|---:|---:|",
        f"| this notebook | {len(rows)} | {hours:.2f} | {usd:.3f} |",
        f"| what it has replaced | {gone['rows']} | {gone['device_hours']:.2f} | {gone['usd']:.3f} |",
        f"| the final run of `make demo` (README) | | {DEMO:.2f} | |", "",
        f"Its rows are {len(notebook.all_rows())} runs and what was timed and studied beside them.",
        f"So {research / (research + DEMO):.1%} of that is research; of Olmo 3's 8.34M GPU-hours {OLMO:.1%} were",
        f"development (arXiv 2605.01158). A device is a thread of the CPU. The notebook takes {hours / ALLOWED:.0%} of",
        f"the {ALLOWED:.0f} device-hours that it may take; its longest row {60 * longest:.0f} device-minutes. Rows of "
        f"{' and '.join(dict.fromkeys((dates[0], dates[-1])))} on {'; '.join(machines)}.", "",
    ]  # fmt: skip
