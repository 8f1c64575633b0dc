"""Drafts by the MTP layers, on a trained model: tokens a second with and without, and how repetitive the text is.

    python bench/speculate.py RUN [--format fp32] [--prompts 8] [--json]

One answer at a time to beginnings of the run's held-out documents. The three ways take turns and say the same.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

from rounds import in_turns
from trained import repetition, trained

from baleen.infer.engine import Engine, Request
from baleen.infer.native.runner import fastest_runner
from baleen.infer.sampler import SamplingParams

WAYS = (0, 1, "auto")


def measure(engine: Engine, prompts: list[list[int]], temperature: float, tokens: int) -> dict:
    speeds: dict[str, list[float]] = {str(way): [] for way in WAYS}
    kept = drafted = 0
    spoken = []
    for seed, prompt in enumerate(prompts):
        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=tokens, ignore_eos=True)
        answers = []
        for way in in_turns(WAYS, seed):
            generation = engine.generate([Request(prompt, params)], speculate=way)
            events, started = iter(generation), 0.0
            answer = [*next(events).token_ids]  # the prompt has been read
            first, started = len(answer), time.perf_counter()
            for event in events:
                answer += event.token_ids
                if way == 1:
                    kept, drafted = kept + event.accepted, drafted + event.drafted
            speeds[str(way)].append((len(answer) - first) / (time.perf_counter() - started))
            answers.append(answer)
        assert answers[0] == answers[1] == answers[2], "drafts changed an answer"
        spoken.append(answers[0])
    median = {way: statistics.median(runs) for way, runs in speeds.items()}
    return {
        "tokens_per_second": {"without": median["0"], "with": median["1"], "auto": median["auto"]},
        "ratio": statistics.median(b / a for a, b in zip(speeds["0"], speeds["1"], strict=True)),
        "acceptance": kept / max(1, drafted),
        "repetition": repetition(spoken),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--format", default="fp32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    run = trained(args.run)
    prompts = [run.tokenizer.encode(document.text)[:32] for document in run.heldout[: args.prompts]]
    runner = functools.partial(fastest_runner, format=args.format)
    engine = Engine(run.model.float(), run.tokenizer, runner=runner)
    measure(engine, prompts[:1], 0.0, 20)
    rows = {f"temperature {t:g}": measure(engine, prompts, t, args.tokens) for t in (0.0, 0.8, 1.0)}
    if args.json:
        print(json.dumps(rows))
        return
    for name, row in rows.items():
        speed = "  ".join(f"{way} {value:,.0f}" for way, value in row["tokens_per_second"].items())
        print(f"{name:16} tokens/s: {speed}  ratio {row['ratio']:.2f}  acceptance {row['acceptance']:.0%}  "
              f"repetition {row['repetition']:.0%}")  # fmt: skip


if __name__ == "__main__":
    main()
