"""How time per token and memory grow with context, experts, batch and vocabulary, beside what theory counts.

    python bench/growth.py [--out docs/growth.json] [--only experts] [--precision bf16] [--shrink 8] [--json]

Config S with one thing changed at a time, each point in a process of its own; rows are kept in --out as they come, and
those that are there, of this code and machine, are not measured again. Experts are measured in three turns, of which
medians count. Then `python bench/growth_plot.py` draws them. Eight minutes to half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from rounds import some_of
from table import version

from baleen.train.precision import resolve_precision

EXPERTS = (8, 16, 32, 64, 128, 256)
CONTEXTS = (512, 2048, 8192, 32768)
BATCHES = (1, 2, 4, 8, 16, 32)
VOCABULARIES = (1024, 4096, 16384, 65536)
STEP_TOKENS = 16384  # of a training step, where experts grow; twice that where the context does
LENGTH = 256
TURNS = 3
AXES = ["experts", "context", "batch", "vocabulary"]
MEASURED = ("seconds", "optimizer_seconds", "bytes")


def points(precision: str, shrink: int) -> Iterator[dict[str, Any]]:
    """What growth_point.py is asked: {axis, value, work, precision, batch, length, steps, model}.

    precision: of training; decoding reads fp32. shrink: so much less of all.
    """

    def point(axis: str, value: int, work: str, batch: int, length: int, steps: int, **model: int) -> dict[str, Any]:
        used = "fp32" if work == "decode" else precision
        room = dict(batch=batch, length=length, steps=steps)
        return dict(axis=axis, value=value, work=work, precision=used, **room, model=model)

    tokens = STEP_TOKENS // shrink
    contexts = [context for context in CONTEXTS if context <= 2 * tokens]
    for turn in range(TURNS):
        for experts in EXPERTS[:: 1 if shrink == 1 else 5]:
            yield point("experts", experts, "train", tokens // LENGTH, LENGTH, 3, n_routed_experts=experts) | {
                "turn": turn
            }
    for context in contexts:
        yield point("context", context, "train", 2 * tokens // context, context, 1)
    for batch in BATCHES:
        yield point("batch", batch, "train", batch, LENGTH, 5)
    for vocabulary in VOCABULARIES[:: 1 if shrink == 1 else 3]:
        yield point("vocabulary", vocabulary, "train", 8, LENGTH, 3, vocab_size=vocabulary)
    for context in contexts:
        yield point("context", context, "decode", 1, context, 48)
    for batch in BATCHES:
        yield point("batch", batch, "decode", batch, 512, 48)


def measured(point: dict[str, Any]) -> dict[str, Any]:
    worker = [sys.executable, str(Path(__file__).with_name("growth_point.py"))]
    done = subprocess.run(worker, input=json.dumps(point), stdout=subprocess.PIPE, text=True, check=True)
    return point | json.loads(done.stdout)


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a value: of several turns the medians."""
    kind, out = itemgetter("work", "precision", "axis", "value", "batch", "length"), []
    for of_value in dict.fromkeys(map(kind, rows)):
        mine = [row for row in rows if kind(row) == of_value]
        measured = {key: statistics.median(row[key] for row in mine) for key in MEASURED if key in mine[0]}
        out.append(mine[0] | measured)
    return out


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of each kind of work: seconds per token and bytes at the last value over those at the first, and theory's."""
    rows, found, kind = medians(rows), {}, itemgetter("work", "precision", "axis")
    for work, precision, axis in dict.fromkeys(map(kind, rows)):
        mine = [row for row in rows if kind(row) == (work, precision, axis)]
        first, last = mine[0], mine[-1]
        name = f"{work} {precision}, {axis} {first['value']} to {last['value']}"
        for key in ("seconds", "bytes"):
            found[f"{name}: {key}"] = last[key] / first[key]
            found[f"{name}: {key} in theory"] = last["theory"][key] / first["theory"][key]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/growth.json"))
    parser.add_argument("--only", type=some_of(*AXES), default=AXES)
    own = resolve_precision("auto", torch.device("cpu"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=own, help="of training; here: %(default)s")
    parser.add_argument("--shrink", type=int, default=1, help="a power of two: try it out with so much less work")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.shrink != 1 and args.out == parser.get_default("out"):
        parser.error("--shrink is for trying out: name another file with --out")
    of = version()
    kept = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    rows = [row for row in kept if of.items() <= row.items()]
    old = [row for row in kept if row not in rows]  # of other code or another machine: until all is measured anew
    for point in points(args.precision, args.shrink):
        if point["axis"] not in args.only or any(point.items() <= row.items() for row in rows):
            continue
        rows.append(measured(point) | of)
        again = [{key: row[key] for key in point} for row in rows]
        old = [row for row in old if not any(one.items() <= row.items() for one in again)]
        args.out.write_text(json.dumps({"rows": old + rows}, indent=1) + "\n")
        row = rows[-1]
        print(
            f"{row['work']:6} {row['axis']:10} {row['value']:>6,} {1e6 * row['seconds']:9,.1f} us a token"
            f" {row['bytes'] / 1e6:9,.1f} MB, {row['theory']['bytes'] / 1e6:,.1f} counted",
            file=sys.stderr,
        )
    result = {"rows": rows, "ratios": ratios(rows)}
    if args.json:
        print(json.dumps(result))
        return
    for name, ratio in result["ratios"].items():
        print(f"{name:60} {ratio:8.2f}")


if __name__ == "__main__":
    main()
