"""Taking turns: contenders checked against each other, timed in rounds, and shown as medians, ratios and spread."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from contenders import Baleen, Contender, LlamaCpp, Transformers, differences, gguf_file, machine, versions
from torch import Tensor

from baleen.infer.native.library import native_library
from baleen.model.transformer import Transformer

T = TypeVar("T")
WINDOW = 0.5  # seconds, of each contender in each round
LLAMA = {"fp32": "f32", "bf16": "f16", "int8": "q8_0", "int4": "q4_1"}  # the same bits a weight
# Of the logits, against fp32. Random gates choose among near ties, which rounding turns; strangers differ by 1.4.
# llama.cpp's F32 rounds to 16 bits on its way: after one token it differs by 4e-4, where transformers does by 3e-6.
TOLERANCE = {"fp32": 0.01, "f32": 0.05, "bf16": 0.5, "f16": 0.5, "int8": 0.8, "q8_0": 0.8, "int4": 1.1, "q4_1": 1.1}
LEFT_OUT = {"transformers": 1 / 8, "fp32": 1 / 8, "f32": 3 / 8}  # of the rows; F32 turned 5 of 16 (M, 64 experts)
AFTER_ONE_TOKEN = 2e-3


def some_of(*names: str) -> Callable[[str], list[str]]:
    """For argparse: names apart by commas, of these."""

    def read(text: str) -> list[str]:
        asked = [name for name in text.split(",") if name]
        if unknown := set(asked) - set(names):
            raise argparse.ArgumentTypeError(f"there is no {min(unknown)!r}: take some of {', '.join(names)}")
        return asked

    return read


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=("S", "M", "L"), default="M")
    packed = ["fp32", "bf16", "int8", "int4"] if native_library() else ["fp32"]  # PyTorch alone has no packed formats
    peers = ["transformers", "llama.cpp"]
    parser.add_argument("--formats", type=some_of(*packed), default=[f for f in ("fp32", "int8") if f in packed])
    parser.add_argument("--peers", type=some_of(*peers), default=peers)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path("runs/bench-models"), help="keeps the files for llama.cpp")
    parser.add_argument("--json", action="store_true")
    return parser


def contenders(args: argparse.Namespace, model: Transformer, *, sequences: int, length: int) -> dict[str, Contender]:
    """Baleen in fp32 and in every format asked for, and the peers; llama.cpp at the same bits a weight."""
    formats = ["fp32", *(format for format in args.formats if format != "fp32")]
    room = {"sequences": sequences, "length": length}
    made: dict[str, Contender] = {}
    for format in formats:
        made[f"baleen {format}"] = Baleen(model, None if format == "fp32" else format, **room)
    if "transformers" in args.peers:
        made["transformers"] = Transformers(model)
    for format in formats:
        if "llama.cpp" in args.peers and format in LLAMA:
            path = gguf_file(model, args.config, LLAMA[format], args.cache)
            made[f"llama.cpp {LLAMA[format]}"] = LlamaCpp(path, **room)
    return made


def check(made: dict[str, Contender], run: Callable[[Contender], Sequence[Tensor]]) -> dict[str, float]:
    """How far the logits of each lie from those of the first; an error where it is too far.

    Of each sequence all rows but a share that is left out, for rounding turns a route here and there. The worst
    sequence counts. Of 32 bits also what follows one token, where there is no context to carry such a turn on.
    """
    first, *others = made
    reference, found = run(made[first]), {}
    if not all(logits.isfinite().all() for logits in reference):
        raise SystemExit(f"{first} computes logits that are not finite")
    alone = [[token] for token in range(1, len(reference[0]) + 1)]
    shortest = made[first].prefill(alone).clone()
    for name in others:
        kind = name.split()[-1]
        tolerance = TOLERANCE.get(kind, TOLERANCE["fp32"])
        steps = [differences(a, b) for a, b in zip(run(made[name]), reference, strict=True)]
        left_out = int(len(steps) * LEFT_OUT.get(kind, 0.5))
        found[name] = max(sorted(rows)[-1 - left_out] for rows in zip(*steps, strict=True))
        after_one = max(differences(made[name].prefill(alone), shortest)) if kind in ("transformers", "f32") else 0.0
        if not (found[name] <= tolerance and after_one <= AFTER_ONE_TOKEN):  # NaN is not
            apart = f"{found[name]:.2g}, after one token by {after_one:.2g}"
            raise SystemExit(f"{name} computes something else than {first}: logits differ by {apart}")
    return found


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def speed(run: Callable[[], object], tokens: int, before: Callable[[], object] = lambda: None) -> float:
    """Tokens a second of `run`, again and again until WINDOW seconds are timed; `before` it, what is not timed."""
    timed, times = 0.0, 0
    while timed < WINDOW:
        before()
        timed, times = timed + seconds(run), times + 1
    return times * tokens / timed


def in_turns(names: Sequence[T], round_: int) -> list[T]:
    """All of them, in each round another one first."""
    first = round_ % len(names)
    return [*names[first:], *names[:first]]


def ratio(ours: dict[str, Any], peer: dict[str, Any]) -> float:
    """The median of ours over the peer's, round by round: what slows both down does not count."""
    return statistics.median(a / b for a, b in zip(ours["rounds"], peer["rounds"], strict=True))


def summary(made: dict[str, Contender], speeds: dict[str, list[float]], apart: dict[str, float]) -> dict:
    """{baleen, peers, ratios, machine, versions} of tokens a second, one number a round."""

    def row(name: str) -> dict[str, Any]:
        runs, contender = speeds[name], made[name]
        median = statistics.median(runs)
        out: dict[str, Any] = {"tokens_per_second": median, "spread": (max(runs) - min(runs)) / median, "rounds": runs}
        if name in apart:
            out["logits_differ_by"] = apart[name]
        return out | ({"path": contender.path} if isinstance(contender, Baleen) else {})

    ours = [name for name in made if isinstance(made[name], Baleen)]
    peers = [name for name in made if name not in ours]
    rows = {name: row(name) for name in made}
    return {
        "baleen": {name.split()[1]: rows[name] for name in ours},
        "peers": {name: rows[name] for name in peers},
        "ratios": {f"{a} / {b}": ratio(rows[a], rows[b]) for a in ours for b in peers},
        "machine": machine(),
        "versions": versions(),
    }


def show(result: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    for name, row in ({f"baleen {name}": row for name, row in result["baleen"].items()} | result["peers"]).items():
        note = f"  {row['path']}" if "path" in row else ""
        print(f"{name:18} {row['tokens_per_second']:9,.1f} tokens/s  spread {row['spread']:4.0%}{note}")
    for name, ratio in result["ratios"].items():
        print(f"{name:36} {ratio:6.2f}")
