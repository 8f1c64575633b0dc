"""Decoding beside transformers and llama.cpp: tokens a second, one sequence or several, on the same weights and tokens.

    python bench/decode.py --config S|M|L [--batch 1] [--formats fp32,int8] [--json]

All take turns in one process, several rounds; medians of the rounds. First the logits of all are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from contenders import Baleen, Contender, LlamaCpp, Transformers, difference, gguf_file, machine, network

PROMPT = 128
LLAMA = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0"}  # the same bits a weight
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "int8": 0.1, "int4": 0.5}  # of the logits, against fp32


def contenders(args: argparse.Namespace) -> dict[str, Contender]:
    model = network(args.config)
    room = {"sequences": args.batch, "length": PROMPT + args.steps + 16}
    made: dict[str, Contender] = {}
    for format in args.formats:
        made[f"baleen {format}"] = Baleen(model, None if format == "fp32" else format, **room)
    if "transformers" in args.peers:
        made["transformers"] = Transformers(model)
    for format in args.formats:
        if "llama.cpp" in args.peers and format in LLAMA:
            path = gguf_file(model, args.config, LLAMA[format], args.cache)
            made[f"llama.cpp {LLAMA[format]}"] = LlamaCpp(path, **room)
    return made


def check(made: dict[str, Contender], prompts: list[list[int]], stream: list[list[int]]) -> dict[str, float]:
    """Error if one computes something else; the differences of the logits from the first contender's, by name."""
    first, *others = made
    reference = [made[first].prefill(prompts).clone(), *(made[first].step(tokens).clone() for tokens in stream[:3])]
    found = {}
    for name in others:
        own = [made[name].prefill(prompts).clone(), *(made[name].step(tokens).clone() for tokens in stream[:3])]
        found[name] = max(difference(a, b) for a, b in zip(own, reference, strict=True))
        kind = next((f for f in TOLERANCE if f in name or LLAMA.get(f, "?") in name), "fp32")
        if found[name] > TOLERANCE[kind]:
            raise SystemExit(f"{name} computes something else than {first}: logits differ by {found[name]:.2g}")
    return found


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, object]:
    made = contenders(args)
    generator = torch.Generator().manual_seed(1)
    vocab = network_vocab(args.config)
    prompts = torch.randint(vocab, (args.batch, PROMPT), generator=generator).tolist()
    stream = torch.randint(vocab, (args.steps, args.batch), generator=generator).tolist()
    differences = check(made, prompts, stream)
    speeds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(args.rounds):
        for name, contender in made.items():
            contender.prefill(prompts)
            seconds = timed(lambda c=contender: [c.step(tokens).argmax(-1).tolist() for tokens in stream])
            speeds[name].append(args.batch * args.steps / seconds)
    return summary(made, speeds, differences) | {"config": args.config, "batch": args.batch}


def network_vocab(name: str) -> int:
    return {"S": 4096, "M": 8192, "L": 32000}[name]


def summary(made: dict[str, Contender], speeds: dict[str, list[float]], differences: dict[str, float]) -> dict:
    def row(name: str) -> dict[str, object]:
        runs = speeds[name]
        median = statistics.median(runs)
        out = {"tokens_per_second": median, "spread": (max(runs) - min(runs)) / median}
        if name in differences:
            out["logits_differ_by"] = differences[name]
        return out | ({"path": made[name].path} if isinstance(made[name], Baleen) else {})

    ours = [name for name in made if isinstance(made[name], Baleen)]
    peers = [name for name in made if name not in ours]
    rows = {name: row(name) for name in made}
    speed = {name: rows[name]["tokens_per_second"] for name in made}
    return {
        "baleen": {name.split()[1]: rows[name] for name in ours},
        "peers": {name: rows[name] for name in peers},
        "ratios": {f"{a} / {b}": speed[a] / speed[b] for a in ours for b in peers},
        "machine": machine(),
    }


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=("S", "M", "L"), default="M")
    parser.add_argument("--formats", type=lambda text: text.split(","), default=["fp32", "int8"])
    parser.add_argument("--peers", type=lambda text: text.split(","), default=["transformers", "llama.cpp"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path("runs/bench-models"), help="the files for llama.cpp")
    parser.add_argument("--json", action="store_true")
    return parser


def show(result: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    rows = {f"baleen {name}": row for name, row in result["baleen"].items()} | result["peers"]
    for name, row in rows.items():
        note = f"  {row['path']}" if "path" in row else ""
        print(f"{name:18} {row['tokens_per_second']:9,.1f} tokens/s  spread {row['spread']:4.0%}{note}")
    for name, ratio in result["ratios"].items():
        print(f"{name:36} {ratio:6.2f}")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=48)
    args = parser.parse_args()
    print(f"decode, config {args.config}, batch {args.batch}", file=sys.stderr)
    show(measure(args), args.json)


if __name__ == "__main__":
    main()
