"""Text with something to recall in it: conversations with words of four kinds strewn in, asked for at the end.

What a model is trained on and tested with in the claim on context. A needle is a line such as "Fruit Pear", one of each
kind in a document; after the line "Again:" each is said again, so whoever has read the first knows how the second ends.
To look that up is one step of attention, from the kind to the words of that kind, which a network this small learns
from a million tokens. What takes two steps it does not learn from so many: of words that only the name before them
tells apart ("Anna river", "The word of Anna is river") it recalled no more than by chance, and so with a colon after
the kind.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from baleen.data.corpus import read_documents

AGAIN = "Again:\n"
SHORT, TIMES = 1000, 9  # documents of fewer characters have each needle so many times before its question
KINDS = {
    "Colour": ("Red", "Blue", "Green", "Yellow", "Purple", "Pink", "Brown", "White"),
    "Animal": ("Horse", "Tiger", "Rabbit", "Monkey", "Camel", "Wolf", "Sheep", "Goat"),
    "Fruit": ("Apple", "Pear", "Lemon", "Grape", "Peach", "Cherry", "Melon", "Banana"),
    "City": ("Paris", "London", "Rome", "Berlin", "Tokyo", "Cairo", "Madrid", "Moscow"),
}


def write_needles(file: Path, chars: int, seed: int = 0) -> None:
    """Documents of about `chars` characters, all of the conversations' text once, one JSON object a line."""
    rng, waiting, lines = random.Random(seed), "", []
    for document in read_documents(["package:chitchat-dataset"], "chat"):
        waiting += document.text
        while len(waiting) >= chars:
            lines.append(json.dumps({"text": with_needles(waiting[:chars], rng)}))
            waiting = waiting[chars:]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def with_needles(text: str, rng: random.Random) -> str:
    """`text` with needles instead of some of its end, about as long as before."""
    needles = [f"{kind} {rng.choice(words)}\n" for kind, words in KINDS.items()]
    questions = AGAIN + "".join(rng.sample(needles, len(needles)))
    times = TIMES if len(text) < SHORT else 1
    lines = text[: len(text) - (times + 1) * len(questions)].splitlines(keepends=True)
    for needle in times * needles:
        lines.insert(rng.randrange(len(lines)), needle)
    return "".join(lines).rstrip("\n") + "\n" + questions


def questions_of(text: str) -> list[tuple[int, int, float]]:
    """(where the answer begins, where it ends, share of the text before its needle) of each question of a document."""
    first = text.rindex(AGAIN)
    found, start = [], first + len(AGAIN)
    for needle in text[start:].splitlines(keepends=True):
        end = start + len(needle) - 1
        found.append((start + needle.index(" "), end, text.index(needle) / first))
        start = end + 1
    return found
