"""Drafts by the MTP layers, on a trained model: tokens a second with and without, and how repetitive the text is.

    python bench/speculate.py RUN [--format fp32] [--prompts 8] [--json]

One answer at a time to beginnings of the run's held-out documents. The three ways take turns and say the same.
Repetition: the share of an answer's 4-grams that it has said before; loops are easy to draft.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from baleen.config import load_recipe
from baleen.data.prepare import prepare
from baleen.infer.engine import Engine, Request
from baleen.infer.native.runner import fastest_runner
from baleen.infer.sampler import SamplingParams
from baleen.interop.load import load

WAYS = (0, 1, "auto")


def repetition(ids: Sequence[int]) -> float:
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / max(1, len(grams))


def measure(engine: Engine, prompts: list[list[int]], temperature: float, tokens: int) -> dict:
    speeds: dict[str, list[float]] = {str(way): [] for way in WAYS}
    kept = drafted = 0
    repeated = []
    for seed, prompt in enumerate(prompts):
        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=tokens, ignore_eos=True)
        answers = []
        for way in WAYS:
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
        repeated.append(repetition(answers[0]))
    median = {way: statistics.median(runs) for way, runs in speeds.items()}
    return {
        "tokens_per_second": {"without": median["0"], "with": median["1"], "auto": median["auto"]},
        "ratio": median["1"] / median["0"],
        "acceptance": kept / max(1, drafted),
        "repetition": statistics.mean(repeated),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--format", default="fp32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    recipe, loaded = load_recipe(args.run / "recipe.toml"), load(args.run)
    heldout = prepare(
        recipe.data,
        vocab_size=recipe.model.vocab_size,
        seq_len=recipe.train.seq_len,
        seed=recipe.train.seed,
        cache_dir=args.run / "data",
    ).heldout
    prompts = [loaded.tokenizer.encode(document.text)[:32] for document in heldout[: args.prompts]]
    runner = functools.partial(fastest_runner, format=args.format)
    engine = Engine(loaded.model.float(), loaded.tokenizer, runner=runner)
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
