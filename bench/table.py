"""The table of speed: each kind of work beside its peers, kept row by row in bench/results/speed.json, shown in README.

    python bench/table.py [ROW ...] [--page]

Without a ROW (train-S, decode-M-8, ...) all that are missing or were measured with other code
or elsewhere: stopped, the same
command goes on. A ROW that is named is measured again. --page only writes the README's table. Half an hour on two
cores on which nothing else runs.
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

from contenders import machine
from rounds import LLAMA

from baleen.parallel.ranks import fingerprint_of_code

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "speed.json", HERE.parent / "README.md"
BEGIN, END = "<!-- made by bench/table.py -->", "<!-- end of the table of speed -->"
ROWS: dict[str, tuple[str, ...]] = {
    "train-S": ("train.py", "--config", "S"),
    "train-M": ("train.py", "--config", "M"),
    "decode-S-1": ("decode.py", "--config", "S"),
    "decode-S-8": ("decode.py", "--config", "S", "--batch", "8"),
    "decode-M-1": ("decode.py", "--config", "M", "--formats", "fp32,bf16,int8,int4"),
    "decode-M-8": ("decode.py", "--config", "M", "--batch", "8"),
    "decode-L-1": ("decode.py", "--config", "L", "--rounds", "3"),
    "prefill-S": ("prefill.py", "--config", "S"),
    "prefill-M": ("prefill.py", "--config", "M"),
    "prefill-L": ("prefill.py", "--config", "L", "--rounds", "3"),
}
Row = dict[str, Any]


def version() -> dict[str, Any]:
    """What a row is of: this machine, the package's code and that of the benchmarks."""
    digest = hashlib.sha256(fingerprint_of_code().encode())
    for file in sorted([*HERE.glob("*.py"), HERE / "configs.toml"]):
        digest.update(file.read_bytes())
    return {"code": digest.hexdigest()[:16], "machine": machine()}


def measured(name: str) -> Row:
    program, *options = ROWS[name]
    command = [sys.executable, str(HERE / program), *options, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | version() | {"date": datetime.date.today().isoformat()}


def table(rows: dict[str, Row]) -> str:
    """Tokens a second, medians of the rounds, and how many times the peer's that is; of the rows that are there."""
    lines = ["| tokens/s | weights | Baleen | transformers | | llama.cpp | | dense | |", "|---|---|" + "---:|" * 7]
    for name in ROWS:
        row = rows.get(name, {"baleen": {}})
        formats = {"fp32": row["baleen"]} if name.startswith("train") and name in rows else row["baleen"]
        for format, ours in formats.items():
            speed = ours["tokens_per_second"]
            peers = ["transformers" if format == "fp32" else "", f"llama.cpp {LLAMA[format]}", "dense"]
            cells = [_beside(row["peers"], peer, speed) for peer in peers]
            lines.append(f"| {_words(name)} | {format} | {speed:,.0f} | {' | '.join(cells)} |")
    if not rows:
        return ""
    dates = sorted(row["date"] for row in rows.values())
    machines = {"{cpu}, {threads} threads, torch {torch}".format(**row["machine"]) for row in rows.values()}
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return "\n".join([*lines, "", f"{when}, {'; '.join(sorted(machines))}.", ""])


def _beside(peers: dict[str, Row], kind: str, ours: float) -> str:
    """Two cells: the fastest peer of that kind, and ours over it; empty without one."""
    speeds = [row["tokens_per_second"] for name, row in peers.items() if kind and name.startswith(kind)]
    return f"{max(speeds):,.0f} | {ours / max(speeds):.2f} ×" if speeds else " | "


def _words(name: str) -> str:
    """`decode-M-8` as people read it."""
    work, config, *batch = name.split("-")
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
    with_table(README.read_text(encoding="utf-8"), {})  # before half an hour of work, that its place is there
    wanted = asked.rows or [name for name in ROWS if not version().items() <= rows.get(name, {}).items()]
    for name in () if asked.page else wanted:
        rows[name] = measured(name)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    README.write_text(with_table(README.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
