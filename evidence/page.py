"""docs/evidence.md with its plots, and the table in the README, from the rows and from nothing else."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
from claim import Notebook, interval
from measures import BEFORE, SPIKE
from plot import Effect, intervals, losses_by_size
from studies import STUDIES, read_study, studies_done

SIZES = ("sparse-128", "sparse", "sparse-256", "sparse-384")
BEGIN, END = "<!-- made by evidence/notebook.py --page -->", "<!-- end -->"
INTRODUCTION = """\
Which of V3's claims hold at a size that a laptop can run. Made by `python evidence/notebook.py --page` from
`evidence/rows`, not edited by hand; `make evidence` runs what is missing, `make evidence-quick` two rows again.

Every row is one arm with one seed, from the same start (`evidence/base.toml`: 5M parameters, hidden 192, 4 layers,
589,824 tokens of conversations) unless its claim says otherwise. The arms of a claim are paired by seed: one order of
data and, where their networks are alike, one start. They have equal tokens unless an arm says otherwise. Differences
are relative to the first arm, those of shares in points; ± is the 95 % interval by Student's t, wide over so few seeds,
and not corrected for many claims. Learning rates are tuned once a family, by one seed, on the same held-out text, and a
best rate at the edge of its grid is refused. Seconds are those of all steps of an arm, of the median step when the arms
take turns with nothing beside them (`python evidence/times.py`). *Holds* and *does not hold* mean: beyond that
interval, at this size, on this text.
"""
STEPS_OF_A_SPIKE = 5
OLMO = 0.822  # of Olmo 3's 8.34M GPU-hours: development (arXiv 2605.01158)


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
    if _all_sizes(notebook):
        plots["sizes"] = losses_by_size(_by_size(notebook), "active parameters", "held-out bits per byte")
    return plots


def page(notebook: Notebook) -> str:
    lines = [
        "# Evidence",
        "",
        INTRODUCTION,
        summary(notebook),
        page_of_claims(notebook),
    ]
    lines += _sizes(notebook)
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
    if not notebook.complete(name):
        return lines
    measures = list(dict.fromkeys((claim.measure, *claim.shows)))
    seconds = notebook.run_seconds(name) if claim.timed else None
    columns = [*measures, *(["seconds"] if claim.timed else [])]
    lines += [f"| arm | difference | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for number, arm in enumerate(claim.arms):
        gap = _gap(notebook, name, arm) if number else ""
        values = [_mean(notebook, name, arm, measure) for measure in measures]
        if claim.timed:
            values.append(f"{seconds[arm]:.0f}" if seconds else "not timed")
        lines.append(f"| {arm} | {gap} | {' | '.join(values)} |")
    lines += ["", f"{len(claim.seeds)} seeds; `python evidence/notebook.py {name}`.", ""]
    return [*lines, f"![Differences](evidence/{name}.svg)", ""]


def _mean(notebook: Notebook, name: str, arm: str, measure: str) -> str:
    rows = [notebook.row(name, arm, seed) for seed in notebook.claims[name].seeds]
    values = [row["measured"][measure] for row in rows if row is not None and measure in row["measured"]]
    if not values:
        return ""  # a dense network has no nodes, one without MTP no acceptance
    mean, half = interval(values)
    if len(set(values)) == 1:
        return f"{mean:,.0f}" if mean >= 100 else f"{mean:.4f}"
    return f"{mean:,.0f} ± {half:,.0f}" if mean >= 100 else f"{mean:.4f} ± {half:.4f}"


def _by_size(notebook: Notebook) -> dict[str, list[tuple[float, float]]]:
    arms = list(notebook.claims[SIZES[0]].arms)
    return {
        arm: [
            (
                statistics.mean(notebook.values(name, arm, "active_parameters")),
                statistics.mean(notebook.values(name, arm, "heldout_bpb")),
            )
            for name in SIZES
        ]
        for arm in arms
    }


def _all_sizes(notebook: Notebook) -> bool:
    return all(name in notebook.claims and notebook.complete(name) for name in SIZES)


def _sizes(notebook: Notebook) -> list[str]:
    """A power law of each arm's losses, fitted seed by seed, and what it says of time."""
    lines = ["## Sparse and dense over four sizes", ""]
    if not _all_sizes(notebook):
        return [*lines, f"Not all rows of {', '.join(SIZES)} are there yet.", ""]
    arms = list(notebook.claims[SIZES[0]].arms)
    lines += [
        "log(bits per byte) = a + b log(active parameters), fitted to each seed alone; ± over the seeds, 95 %. All",
        "sizes have the same tokens, so this is no law of compute.", "",
        "| arm | exponent b | ± |", "|---|---:|---:|",
    ]  # fmt: skip
    for arm in arms:
        sizes = np.log([notebook.values(name, arm, "active_parameters") for name in SIZES])
        losses = np.log([notebook.values(name, arm, "heldout_bpb") for name in SIZES])
        slopes = [np.polyfit(sizes[:, s], losses[:, s], 1)[0] for s in range(sizes.shape[1])]
        lines.append("| {} | {:+.4f} | {:.4f} |".format(arm, *interval([float(b) for b in slopes])))
    dense, sparse = arms
    plot = "![Losses by size](evidence/sizes.svg)"
    timed = [seconds for name in SIZES if (seconds := notebook.run_seconds(name))]
    if len(timed) < len(SIZES):
        return [*lines, "", "Not timed yet: `python evidence/times.py`.", "", plot, ""]
    seconds = {arm: [of_size[arm] for of_size in timed] for arm in arms}
    losses = {arm: [statistics.mean(notebook.values(name, arm, "heldout_bpb")) for name in SIZES] for arm in arms}
    law = np.polyfit(np.log(seconds[dense]), np.log(losses[dense]), 1)
    lines += [
        "",
        "In time: what a dense network that takes the sparse one's seconds would reach, by a line through the dense.",
        "",
        "| claim | sparse less dense | sparse over dense, seconds | sparse | dense in as many seconds | pays |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for i, name in enumerate(SIZES):
        mean, half = interval(notebook.gaps(name, sparse))
        in_time = math.exp(np.polyval(law, math.log(seconds[sparse][i])))
        lines.append(
            f"| {name} | {mean:+.2%} ± {half:.2%} | {seconds[sparse][i] / seconds[dense][i]:.2f} | "
            f"{losses[sparse][i]:.4f} | {in_time:.4f} | {'yes' if losses[sparse][i] < in_time else 'no'} |"
        )
    return [*lines, "", plot, ""]


def _sweeps(notebook: Notebook) -> list[str]:
    lines = ["## Learning rates", "", "| family | rates: held-out bits per byte | |", "|---|---|---|"]
    for name, claim in notebook.claims.items():
        if claim.expects == "least":
            tried = ", ".join(f"{arm}: {_mean(notebook, name, arm, claim.measure) or 'not run'}" for arm in claim.arms)
            lines.append(f"| {claim.says} | {tried} | {notebook.verdict(name)} |")
    return [*lines, ""]


def _no_spike(notebook: Notebook) -> list[str]:
    rows = notebook.all_rows()
    lines = ["## No spike", ""]
    if not rows:
        return [*lines, "No rows yet.", ""]
    worst = max(rows, key=lambda row: row["measured"]["largest_jump"])
    spikes = [row for row in rows if row["measured"]["longest_spike"] >= STEPS_OF_A_SPIKE]
    skipped = sum(row["measured"]["skipped"] for row in rows)
    verdict = "does not hold" if spikes else "holds"
    jump, where = worst["measured"]["largest_jump"], f"{worst['claim']}, {worst['arm']}, seed {worst['seed']}"
    return [
        *lines,
        f"In {len(spikes)} of {len(rows)} rows the loss stays more than {SPIKE} nats above the median of the",
        f"{BEFORE} steps before, for {STEPS_OF_A_SPIKE} or more: **{verdict}**. The largest",
        f"jump of a step is {jump:.3f} nats ({where}), mostly that of a hard batch; {skipped} steps were skipped.",
        "The paper reports no spike that could not be recovered from, and no rollback.",
        "",
    ]


def _account(notebook: Notebook) -> list[str]:
    """What the notebook took, by the ledger, beside another project's research."""
    rows = [*notebook.all_rows(), *notebook.timings(), *studies_done(notebook.folder)]
    hours, usd = sum(row["device_hours"] for row in rows), sum(row["usd"] for row in rows)
    lines = ["## What this notebook cost", ""]
    if not rows:
        return [*lines, "Nothing yet.", ""]
    per_row = hours / len(rows)
    dates = sorted({row["date"] for row in rows})
    machines = sorted({row["machine"] for row in rows})
    return [
        *lines,
        "| | rows | device-hours | USD | share of all |", "|---|---:|---:|---:|---:|",
        f"| this notebook, all of it research | {len(rows)} | {hours:.2f} | {usd:.3f} | {1 - per_row / hours:.1%} |",
        f"| one row, were it the final model | 1 | {per_row:.2f} | {usd / len(rows):.3f} | {per_row / hours:.1%} |",
        f"| Olmo 3, development (arXiv 2605.01158) | | 6,860,000 | | {OLMO:.1%} |", "",
        f"A device is a thread of the CPU. Rows of {' and '.join(dict.fromkeys((dates[0], dates[-1])))} on "
        f"{'; '.join(machines)}.", "",
    ]  # fmt: skip
