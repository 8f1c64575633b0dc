"""Many streaming clients at once: does each get the answer that it gets alone, and how long does it wait for a word?

    python bench/many_clients.py --run RUN [--clients 200] [--tokens 64] [--json]

Two servers, one after the other, so that neither has read a prompt before: all clients ask the first at once, then each
asks the second by itself, with the same seed. Exit code 1 where an answer differs, or where a client waits more than
three times the median for its first word (of an answer without words: for its end).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from contenders import machine
from serve import Exchange, first_model, free_port, post, process

WORDS = "what do you think of the sea and why are whales so large is it cold there how was your day my friend"
LONGEST_PROMPT = 40  # words
PATIENCE = 3.0  # times the median


class Timed(Exchange):
    """One that knows when each byte came."""

    def __init__(self, request: bytes):
        super().__init__(request)
        self.arrivals: list[tuple[int, float]] = []  # bytes so far, and when

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.arrivals.append((len(self.received), time.perf_counter()))

    def when(self, size: int) -> float:
        return next(moment for bytes_so_far, moment in self.arrivals if bytes_so_far >= size)


class Answer(NamedTuple):
    text: str
    finish_reason: str
    tokens: int
    wait: float  # seconds until the first word


async def ask(port: int, body: dict[str, object]) -> Answer:
    started = time.perf_counter()
    request = post("/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})
    _, exchange = await asyncio.get_running_loop().create_connection(lambda: Timed(request), "127.0.0.1", port)
    raw = await exchange.answer
    if not raw.startswith(b"HTTP/1.1 200") or b"\ndata: [DONE]\n" not in raw:
        raise SystemExit(f"the server says: {raw[:300]!r} ... {raw[-300:]!r}")
    text, ends, tokens, first = "", [], 0, None
    for event in re.finditer(rb"^data: (\{.*\})$", raw, re.MULTILINE):
        chunk = json.loads(event[1])
        for choice in chunk["choices"]:
            words = choice["delta"].get("content") or choice["delta"].get("reasoning_content") or ""
            if first is None and (words or choice["finish_reason"]):
                first = exchange.when(event.end())
            text += words
            ends += [choice["finish_reason"]] if choice["finish_reason"] else []
        tokens = chunk["usage"]["completion_tokens"] if chunk["usage"] else tokens
    assert first is not None and len(ends) == 1
    return Answer(text, ends[0], tokens, first - started)


async def together(port: int, bodies: Sequence[dict[str, object]]) -> list[Answer]:
    return await asyncio.gather(*(ask(port, body) for body in bodies))


async def in_turn(port: int, bodies: Sequence[dict[str, object]]) -> list[Answer]:
    return [await ask(port, body) for body in bodies]


def answers_of(args: argparse.Namespace, *, at_once: bool) -> tuple[list[Answer], float]:
    """Of a server of its own; and the seconds that they took."""
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(WORDS.split(), k=rng.randint(1, LONGEST_PROMPT))) for _ in range(args.clients)]
    port = free_port()
    with process([sys.executable, "-m", "baleen", "serve", str(args.run), "--port", str(port)], port):
        model = first_model(port)

        def body(prompt: str, seed: int) -> dict[str, object]:
            messages = [{"role": "user", "content": prompt}]
            return {"model": model, "messages": messages, "max_tokens": args.tokens, "seed": seed}

        asyncio.run(ask(port, body("hello", 0)))  # whatever a server does once
        started = time.perf_counter()
        bodies = [body(prompt, seed) for seed, prompt in enumerate(prompts)]
        answers = asyncio.run((together if at_once else in_turn)(port, bodies))
        return answers, time.perf_counter() - started


def measure(args: argparse.Namespace) -> dict[str, Any]:
    many, seconds = answers_of(args, at_once=True)
    alone, _ = answers_of(args, at_once=False)
    waits, tokens = [answer.wait for answer in many], sum(answer.tokens for answer in many)
    return {
        "run": str(args.run),
        "clients": args.clients,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "ended_by_themselves": sum(answer.finish_reason == "stop" for answer in many),
        "without_a_word": sum(not answer.text for answer in many),
        "different": [
            {"client": number, "together": one.text, "alone": other.text}
            for number, (one, other) in enumerate(zip(many, alone, strict=True))
            if (one.text, one.finish_reason, one.tokens) != (other.text, other.finish_reason, other.tokens)
        ],
        "first_word_seconds": {"median": statistics.median(waits), "slowest": max(waits)},
        "slowest_over_median": max(waits) / statistics.median(waits),
        "machine": machine(),
    }


def show(row: dict[str, Any]) -> None:
    print(f"{row['clients']} clients, {row['tokens']} tokens, {row['tokens_per_second']:,.0f} a second")
    print(f"{row['ended_by_themselves']} answers ended by themselves, {row['without_a_word']} have no word")
    print(f"{row['clients'] - len(row['different'])} answers are as alone")
    for answer in row["different"]:
        print(f"client {answer['client']}: {answer['together']!r}, alone {answer['alone']!r}")
    words = row["first_word_seconds"]
    print(f"first word after {words['median']:.3f} s in the median, {words['slowest']:.3f} s at the latest", end="")
    print(f" ({row['slowest_over_median']:.2f} times the median)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="what to serve, as `baleen serve` takes it")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    row = measure(args)
    if args.json:
        print(json.dumps(row))
    else:
        show(row)
    sys.exit(bool(row["different"]) or row["slowest_over_median"] > PATIENCE)


if __name__ == "__main__":
    main()
