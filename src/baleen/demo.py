"""`baleen demo`: from human conversations to a model that chats, with what it learnt and what it cost."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from baleen.config import UserError
from baleen.cost.card import card_notes, card_table, cost_card
from baleen.data.clean import clean, split
from baleen.data.corpus import read_documents
from baleen.data.document import Document, Message
from baleen.data.tokenizer import Tokenizer
from baleen.eval.acceptance import mtp_acceptance, mtp_acceptance_forced
from baleen.eval.baselines import NgramModel, xz_bits_per_byte
from baleen.eval.next_turn import next_turn_accuracy
from baleen.eval.report import write_report
from baleen.infer.chat import respond
from baleen.infer.engine import Engine
from baleen.infer.recent import recent
from baleen.infer.sampler import SamplingParams
from baleen.interop.load import load
from baleen.recipe import Recipe, load_recipe
from baleen.train.loop import run_stage, train
from baleen.train.rundir import read_metrics, write_aside

RECIPE = "chitchat"
CONTEXTS = 500  # of next-turn accuracy
PROMPTS = 64  # of acceptance
ANSWER = 48  # tokens, at most, in the talks
TALKS = (
    ("hi, how are you?", "what did you do today?"),
    ("do you like music?", "who is your favorite singer?"),
    ("any plans for the weekend?", "sounds good! have fun"),
)


@dataclass(frozen=True)
class Talk:
    """A conversation of the model with two turns of ours."""

    turns: tuple[Message, ...]

    @property
    def answers(self) -> str:
        return "\n".join(turn.content for turn in self.turns if turn.role == "assistant")


def run_demo(run_dir: Path, minutes: float, console: Console) -> dict[str, Any]:
    """Train recipe `chitchat` for `minutes` at most (its tokens grow with them), measure, talk; writes summary.json.

    A demo that was stopped goes on. Raises UserError as `train` does.
    """
    recipe = demo_recipe(minutes)
    resume = (run_dir / "recipe.toml").is_file()
    trained = train(recipe, run_dir, resume=resume, go_on="the same command goes on")
    if trained["status"] == "stopped":
        return trained
    with run_stage(recipe.cost, run_dir, "eval"):
        console.print("\nmeasuring what it learnt ...")
        learnt = measure(recipe, run_dir, trained)
    card = cost_card(run_dir)
    summary = {
        **learnt,
        "cost_headline_usd": card["headline_usd"],
        "cost_full_usd": card["full_usd"],
        "device_hours": card["device_hours"],
    }
    write_aside(run_dir / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    report = write_report(run_dir)
    _tell(console, summary, run_dir, report)
    return summary


def demo_recipe(minutes: float) -> Recipe:
    """The recipe with a limit of time; for other times than its own 8 minutes the tokens are in proportion."""
    recipe = load_recipe(RECIPE)
    if not math.isfinite(minutes):
        raise UserError(f"--minutes {minutes} is no time: give a number")
    batches = round(recipe.train.tokens * minutes / 8 / recipe.train.batch_tokens)
    return load_recipe(
        RECIPE,
        [f"train.minutes={float(minutes)}", f"train.tokens={max(1, batches) * recipe.train.batch_tokens}"],
    )


def measure(recipe: Recipe, run_dir: Path, trained: dict[str, Any]) -> dict[str, Any]:
    """Everything of summary.json but the cost; README says what each figure means."""
    model, tokenizer, _ = load(run_dir)
    data, window = recipe.data, recipe.train.seq_len
    documents = clean(read_documents(data.sources, data.format), min_chars=data.min_chars)
    train_documents, heldout = split(documents, data.heldout_fraction)
    text = "".join(document.text for document in heldout).encode()
    ngram = NgramModel(order=6).fit("".join(document.text for document in train_documents).encode())
    rows = torch.tensor(_rows(tokenizer, heldout, window))
    by_gain, by_likelihood = next_turn_accuracy(model, tokenizer, heldout, contexts=CONTEXTS, window=window)
    talks = [_talk(Engine(model, tokenizer), questions, seed) for seed, questions in enumerate(TALKS)]
    metrics = [row for row in read_metrics(run_dir) if "max_violation" in row][-100:]
    return {
        "tokens_trained": trained["tokens"],
        "train_seconds": trained["train_seconds"],
        "heldout_bpb": trained["heldout_bpb"],
        "ngram_bpb": ngram.bits_per_byte(text),
        "xz_bpb": xz_bits_per_byte(text),
        "next_turn_accuracy": by_gain,
        "next_turn_accuracy_likelihood": by_likelihood,
        "mtp_acceptance": mtp_acceptance(model, _prompts(tokenizer, heldout, window // 2), max_tokens=32),
        "mtp_acceptance_forced": mtp_acceptance_forced(model, rows),
        "distinct_2": distinct_2([talk.answers for talk in talks]),
        "max_violation": sum(row["max_violation"] for row in metrics) / len(metrics),
        "max_violation_pooled": trained["max_violation_pooled"],
        "most_repeated_4gram": max(most_repeated(talk.answers, 4) for talk in talks),
        "samples": [[{"role": turn.role, "content": turn.content} for turn in talk.turns] for talk in talks],
    }


def distinct_2(texts: Sequence[str]) -> float:
    """Different pairs of neighbouring words over all such pairs."""
    pairs = [pair for text in texts for pair in zip(text.lower().split(), text.lower().split()[1:], strict=False)]
    return len(set(pairs)) / max(1, len(pairs))


def most_repeated(text: str, n: int) -> int:
    """How often the most frequent n words in a row occur in a text."""
    words = text.lower().split()
    return max(Counter(zip(*(words[i:] for i in range(n)), strict=False)).values(), default=0)


def _talk(engine: Engine, questions: Sequence[str], seed: int) -> Talk:
    turns: list[Message] = []
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=ANSWER, seed=seed)
    encode = partial(engine.tokenizer.encode_chat, add_generation_prompt=True)
    for question in questions:
        turns.append(Message("user", question))
        prompt_ids, _ = recent(turns, encode, engine.context - ANSWER)
        answer = "".join(event.text for event in respond(engine, prompt_ids, params, speculate=0)).strip()
        turns.append(Message("assistant", answer))
    return Talk(tuple(turns))


def _prompts(tokenizer: Tokenizer, heldout: Sequence[Document], longest: int) -> list[list[int]]:
    """The beginnings of held-out conversations, each up to a question that the model is to answer."""
    prompts = []
    for document in heldout:
        turns = [m for m in document.messages or () if m.role != "system"]
        for end in range(1, min(len(turns), 8), 2):
            ids = tokenizer.encode_chat(turns[:end], add_generation_prompt=True)
            if turns[end - 1].role == "user" and len(ids) <= longest:
                prompts.append(ids)
    return prompts[:: max(1, len(prompts) // PROMPTS)][:PROMPTS]


def _rows(tokenizer: Tokenizer, heldout: Sequence[Document], length: int) -> list[list[int]]:
    ids = [token for document in heldout for token in tokenizer.encode_chat(document.messages or ())]
    return [ids[start : start + length] for start in range(0, len(ids) - length, length)][:PROMPTS]


def _tell(console: Console, summary: dict[str, Any], run_dir: Path, report: Path) -> None:
    for talk in summary["samples"]:
        console.print()
        for turn in talk:
            name = "[cyan]you   [/]" if turn["role"] == "user" else "[bold green]baleen[/]"
            console.print(f"  {name}  {escape(turn['content'])}")
    console.print(
        f"\nheld-out text: [bold]{summary['heldout_bpb']:.3f}[/] bits per byte "
        f"(a byte 6-gram: {summary['ngram_bpb']:.3f}, xz: {summary['xz_bpb']:.3f})\n"
        f"the true next turn among ten, by how much the history raises its likelihood: "
        f"{summary['next_turn_accuracy']:.0%} (chance 10%)\n"
        f"MTP's second token accepted: {summary['mtp_acceptance']:.0%}\n"
        f"busiest expert above the mean: {summary['max_violation']:.0%}\n"
    )
    card = cost_card(run_dir)
    console.print(card_table(card))
    console.print(escape(card_notes(card)))
    console.print(
        f"\nOn the command line after `. .venv/bin/activate`:\n"
        f"Talk to it:           baleen chat {run_dir}\n"
        f"In a browser:         baleen serve {run_dir}, then http://127.0.0.1:8000\n"
        f"A grown-up instead:   make demo-chat (SmolLM2 as a V3 model)\n"
        f"Curves and costs:     {report}\n"
        f"Train on your text:   baleen train chitchat --data FOLDER --run runs/mine\n"
        f"What it cost:         baleen cost card {run_dir}",
        highlight=False,
    )
