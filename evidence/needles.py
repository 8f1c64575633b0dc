"""Text with something to recall in it: conversations with words of people strewn in, which are asked for at the end.

What a model is trained on and tested with in the claim on context. A needle says "The word of Anna is river."; at the
end of its document each is said again after "Again: ", so whoever has read the first knows how the second ends.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from baleen.data.corpus import read_documents

AGAIN = "Again: "
CHARS_PER_NEEDLE = 350
NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Mary", "Nick",
    "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Adam", "Bella", "Carl", "Diana", "Eric", "Fiona", "Greg",
    "Helen", "Ivan", "Julia", "Karl", "Linda", "Mark", "Nora", "Oscar", "Peter", "Ruth", "Simon", "Vera",
)  # fmt: skip
WORDS = (
    "river", "table", "music", "winter", "garden", "coffee", "summer", "window", "paper", "doctor", "mother", "school",
    "movie", "water", "house", "horse", "phone", "money", "night", "morning", "dinner", "sister", "brother", "picture",
    "story", "question", "office", "market", "street", "friend", "party", "chicken", "cheese", "bread", "apple", "salt",
    "board", "light", "stone", "paint", "dance", "game", "book", "train", "plane", "beach", "snow", "rain", "bird",
    "fish", "dog", "cat", "tree", "flower", "shirt", "shoes", "car", "bike", "boat", "bridge", "mountain", "city",
)  # fmt: skip


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
    names = rng.sample(NAMES, min(len(NAMES), 2 + len(text) // CHARS_PER_NEEDLE // 2))
    needles = [f"The word of {name} is {rng.choice(WORDS)}.\n" for name in names]
    questions = "".join(AGAIN + needle for needle in rng.sample(needles, len(needles)))
    lines = text[: len(text) - 2 * len(questions)].splitlines(keepends=True)
    for needle in needles:
        lines.insert(rng.randrange(len(lines)), needle)
    return "".join(lines).rstrip("\n") + "\n" + questions


def questions_of(text: str) -> list[tuple[int, int, float]]:
    """(where the answer begins, where it ends, share of the text before its needle) of each question of a document."""
    found, start = [], text.find(AGAIN)
    first = start
    while start >= 0:
        end = text.index("\n", start)
        needle = text[start + len(AGAIN) : end]
        word = needle.rindex(" ")
        found.append((start + len(AGAIN) + word, end - 1, text.index(needle) / first))
        start = text.find(AGAIN, end)
    return found
