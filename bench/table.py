"""The table of speed: each kind of work beside its peers, kept row by row in bench/results/speed.json, shown in README.

    python bench/table.py [ROW ...] [--page]

Without a ROW (train-S, decode-M-8, ...) all that are missing or were measured with other code or elsewhere: stopped,
the same command goes on. What this CPU cannot run, bf16 without its instructions, leaves the table then. A ROW that is
named is measured again; one that fails is told, and left as it was. --page only writes the README's table. A quarter to
three quarters of an hour on two cores on which nothing else runs.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from contenders import machine, versions
from rounds import LLAMA, ratio

from baleen.model.machine import multiplies_bf16
from baleen.model.native.training import kernels
from baleen.parallel.ranks import fingerprint_of_code

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "speed.json", HERE.parent / "README.md"
BEGIN, END = "<!-- made by bench/table.py -->", "<!-- end of the table of speed -->"
ROWS: dict[str, tuple[str, ...]] = {
    "train-S": ("train.py", "--config", "S", "--rounds", "25"),
    "train-S-bf16": ("train.py", "--config", "S", "--rounds", "25", "--precision", "bf16"),
    "train-M": ("train.py", "--config", "M"),
    "decode-S-1": ("decode.py", "--config", "S"),
    "decode-S-8": ("decode.py", "--config", "S", "--batch", "8"),
    "decode-M-1": ("decode.py", "--config", "M", "--formats", "fp32,bf16,int8,int4"),
    "decode-M-8": ("decode.py", "--config", "M", "--batch", "8"),
    "decode-L-1": ("decode.py", "--config", "L"),
    "prefill-S": ("prefill.py", "--config", "S"),
    "prefill-M": ("prefill.py", "--config", "M"),
    "prefill-L": ("prefill.py", "--config", "L", "--rounds", "3"),
}
Row = dict[str, Any]


def version() -> dict[str, Any]:
    """What a row is of: this machine, the package's code and that of the benchmarks, and what the kernels are built
    for."""
    digest = hashlib.sha256(fingerprint_of_code().encode())
    for file in sorted([*HERE.glob("*.py"), HERE / "configs.toml"]):
        digest.update(file.read_bytes())
    return {"code": digest.hexdigest()[:16], "machine": machine(), "kernels": kernels()}


def measured(name: str) -> Row:
    program, *options = ROWS[name]
    command = [sys.executable, str(HERE / program), *options, "--json"]
    of = version()  # as it is now: whoever edits meanwhile makes the row an old one
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | of | {"date": datetime.date.today().isoformat()}


def table(rows: dict[str, Row]) -> str:
    """Tokens a second, medians of the rounds, and how many times the peer's, round by round; of rows that are there."""
    lines = ["| tokens/s | weights | Baleen | transformers | | llama.cpp | | dense | |", "|---|---|" + "---:|" * 7]
    for name in ROWS:
        row = rows.get(name, {"baleen": {}})
        trained = name.startswith("train") and name in rows
        formats = {row["precision"]: row["baleen"]} if trained else row["baleen"]
        for format, ours in formats.items():
            peers = ["transformers" if format == "fp32" or trained else "", f"llama.cpp {LLAMA[format]}", "dense"]
            cells = [_beside(ours, row["peers"], peer) for peer in peers]
            lines.append(f"| {_words(name)} | {format} | {ours['tokens_per_second']:,.0f} | {' | '.join(cells)} |")
    if not rows:
        return ""
    dates = sorted(row["date"] for row in rows.values())
    machines = {"{cpu}, {threads} threads, torch {torch}".format(**row["machine"]) for row in rows.values()}
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return "\n".join([*lines, "", f"{when}, {'; '.join(sorted(machines))}.", ""])


def _beside(ours: Row, peers: dict[str, Row], kind: str) -> str:
    """Two cells: the fastest peer of that kind, and ours over it, with the least and the most of a round; empty without
    one."""
    own = [peer for name, peer in peers.items() if kind and name.startswith(kind)]
    if not own:
        return " | "
    fastest = max(own, key=lambda peer: peer["tokens_per_second"])
    times = [a / b for a, b in zip(ours["rounds"], fastest["rounds"], strict=True)]
    return f"{fastest['tokens_per_second']:,.0f} | {ratio(ours, fastest):.2f} × ({min(times):.2f} to {max(times):.2f})"


def _words(name: str) -> str:
    """`decode-M-8` as people read it."""
    work, config, *batch = name.removesuffix("-bf16").split("-")
    return f"{work} {config}{f', batch {batch[0]}' if batch else ', 512 tokens' if work == 'prefill' else ''}"


def with_table(readme: str, rows: dict[str, Row]) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, "the README has lost the place of the table of speed"
    return f"{before}{BEGIN}\n{table(rows)}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--page", action="store_true")
    asked = parser.parse_args()
    if unknown := set(asked.rows) - set(ROWS):
        parser.error(f"no row {min(unknown)}: there are {', '.join(ROWS)}")
    rows: dict[str, Row] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with_table(README.read_text(encoding="utf-8"), {})  # before all the work, that its place is there
    here = [name for name in ROWS if not name.endswith("bf16") or multiplies_bf16(torch.device("cpu"))]
    now = version() | {"versions": versions()}  # of the peers, which a row tells too
    wanted = asked.rows or [name for name in here if not now.items() <= rows.get(name, {}).items()]
    if not asked.rows and not asked.page:  # the table of one machine
        rows = {name: row for name, row in rows.items() if name in here}
    failed = []
    for name in () if asked.page else wanted:
        try:
            rows[name] = measured(name)
        except subprocess.CalledProcessError as error:
            print(f"{name} failed: {error}", file=sys.stderr)
            failed.append(name)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    README.write_text(with_table(README.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(table(rows))
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
