"""What MTP drafts bring: how many are kept on held-out prompts, how often answers repeat, and the speed both ways.

    python bench/draft.py runs/smollm2-mtp [--prompts 32] [--max-tokens 96] [--rounds 3] [--json]

Greedy answers to the openings of the run's held-out conversations, one at a time, from their second token on; both ways
take turns, and must give the same answers, but for a token whose two best logits are equal within rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from contenders import machine
from rounds import in_turns, ratio
from trained import Trained, repetition, trained

from baleen.config import UserError
from baleen.infer.engine import Engine, Request
from baleen.infer.sampler import SamplingParams
from baleen.model.transformer import Transformer

TIE = 1e-3


def heldout_prompts(run: Trained, count: int) -> list[list[int]]:
    openings = [document.messages[0] for document in run.heldout if document.messages]
    if not openings:
        raise UserError("the run held no conversations out")
    return [run.tokenizer.encode_chat([opening], add_generation_prompt=True) for opening in openings[:count]]


def measure(args: argparse.Namespace) -> dict:
    run = trained(args.run)
    prompts = heldout_prompts(run, args.prompts)
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)
    speeds: dict[int, list[float]] = {0: [], 1: []}
    answers: dict[int, list[list[int]]] = {0: [], 1: []}
    drafted = accepted = 0
    for round_ in range(args.rounds):
        for depth in in_turns([0, 1], round_):
            engine = Engine(run.model, run.tokenizer)  # a new one: neither way reads prompts for the other
            tokens, seconds = 0, 0.0
            for prompt in prompts:
                generation = engine.generate([Request(prompt, params)], speculate=depth)
                events = iter(generation)
                ids = list(next(events).token_ids)
                after_prompt = generation.stats.seconds
                ids += [id for event in events for id in event.token_ids]
                tokens, seconds = tokens + len(ids) - 1, seconds + generation.stats.seconds - after_prompt
                if round_ == 0:
                    answers[depth].append(ids)
                    drafted += sum(generation.stats.drafted)
                    accepted += sum(generation.stats.accepted)
            speeds[depth].append(tokens / seconds)
    for prompt, plain, drafts in zip(prompts, answers[0], answers[1], strict=True):
        at = next((i for i, (a, b) in enumerate(zip(plain, drafts, strict=False)) if a != b), None)
        if at is not None and (apart := margin(run.model, [*prompt, *plain[:at]])) > TIE:
            raise SystemExit(f"drafts changed an answer, where the two best logits are {apart:.2g} apart")
    rows = {depth: {"tokens_per_second": statistics.median(runs), "rounds": runs} for depth, runs in speeds.items()}
    return {
        "prompts": len(prompts),
        "tokens": sum(map(len, answers[0])),
        "acceptance": accepted / drafted,
        "repetition": repetition(answers[0]),
        "equal_answers": sum(a == b for a, b in zip(answers[0], answers[1], strict=True)) / len(prompts),
        "plain": rows[0],
        "speculative": rows[1],
        "ratio": ratio(rows[1], rows[0]),
        "machine": machine(),
    }


@torch.no_grad()
def margin(model: Transformer, ids: list[int]) -> float:
    """Between the two best logits behind these tokens."""
    best = model.logits(model(torch.tensor([ids])).hidden_BTd[:, -1]).float().topk(2).values[0]
    return float(best[0] - best[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(json.dumps(result, indent=None if arguments.json else 2))
