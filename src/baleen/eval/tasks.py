"""Tasks with a right answer: choosing one of several, closing a gap, writing an answer, writing a program.

A task is a file of JSON lines, all of one kind, which the keys tell:

    choice    {"prompt": str, "choices": [str, ...], "answer": int}
    cloze     {"text": str, "gap": str}            text ends where the gap is; right if greedy decoding says it
    write     {"prompt": str, "answers": [str, ...], "stop": str (a line break)}
    program   {"prompt": str, "test": str}         see programs.py

or the name of one that is made of held-out text: `last-word` (cloze) and `next-line` (choice).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from baleen.config import Strict, UserError
from baleen.data.document import Document

LIMIT = 200  # questions made of held-out text
CANDIDATES = 4
MIN_CONTEXT = 80  # characters before a gap
MIN_LINE = 20  # characters that a line which is chosen among others is longer than
Text = Annotated[str, Field(min_length=1)]


class Choice(Strict):
    prompt: Text
    choices: tuple[Text, ...] = Field(min_length=2)
    answer: Annotated[int, Field(ge=0)]


class Cloze(Strict):
    text: Text
    gap: Text


class Write(Strict):
    prompt: Text
    answers: tuple[str, ...] = Field(min_length=1)
    stop: Text = "\n"
    max_tokens: Annotated[int, Field(ge=1)] = 64


class Program(Strict):
    prompt: Text
    test: Text
    stop: tuple[Text, ...] = ("\ndef ", "\nclass ", "\nif ", "\nprint", "\n#")
    max_tokens: Annotated[int, Field(ge=1)] = 256


Question = Choice | Cloze | Write | Program
KINDS: dict[str, type[Question]] = {"choices": Choice, "gap": Cloze, "answers": Write, "test": Program}


def read_task(file: Path) -> list[Question]:
    """Raises UserError for a file that is missing, mixed, or has a line that is no question."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # JSON's strings may hold Unicode's line separators
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as a task: {error}") from None
    questions = [_question(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    kinds = sorted({type(question).__name__ for question in questions})
    if len(kinds) != 1:
        raise UserError(f"{file} has questions of {' and '.join(kinds) or 'no kind'}: a task has one kind")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:  # also a number of too many digits
        raise UserError(f"{where} is not valid JSON ({error}): write one object a line") from None
    kind = next((kind for key, kind in KINDS.items() if isinstance(row, dict) and key in row), None)
    if kind is None:
        raise UserError(f"{where} has none of the keys {', '.join(KINDS)}, which tell the kind of a question")
    try:
        question = TypeAdapter(kind).validate_python(row)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if isinstance(question, Choice) and question.answer >= len(question.choices):
        raise UserError(f"{where}: answer {question.answer} is none of the {len(question.choices)} choices (from 0)")
    return question


def made_task(name: str, documents: Sequence[Document], seed: int = 0) -> list[Question]:
    """Questions of held-out text: at most LIMIT. Raises UserError for another name, or for too little text."""
    makers = {"last-word": _last_words, "next-line": _next_lines}
    if name not in makers:
        raise UserError(f"no task {name!r}: give a .jsonl file, lm-eval:NAME, or one of {', '.join(makers)}")
    rng = random.Random(seed)
    questions = list(makers[name](documents, rng))
    if not questions:
        raise UserError(f"the held-out text is too short for {name}: raise data.heldout_fraction")
    return [make() for make in rng.sample(questions, min(LIMIT, len(questions)))]


# A question is made when it is drawn: each holds all that stands before it in its document.
MakeQuestion = Callable[[], Question]


def _last_words(documents: Sequence[Document], rng: random.Random) -> Iterator[MakeQuestion]:
    """The last word of each line that comes up before in its document, so that reading it helps."""
    for document in documents:
        text, start, seen = document.text, 0, set[str]()
        for line in text.splitlines(keepends=True):
            head, _, word = line.rstrip().rpartition(" ")
            if head and len(word) > 3 and start >= MIN_CONTEXT and word in seen:
                end = start + len(head)
                yield lambda text=text, end=end, gap=f" {word}": Cloze(text=text[:end], gap=gap)
            seen.update(line.split())
            start += len(line)


def _next_lines(documents: Sequence[Document], rng: random.Random) -> Iterator[MakeQuestion]:
    """The line that follows, among lines of other documents."""
    lines = [[line for line in document.text.splitlines() if len(line) > MIN_LINE] for document in documents]
    others = [(i, line) for i, of_one in enumerate(lines) for line in of_one]
    for i, document in enumerate(documents):
        text, start = document.text, 0
        for whole in text.splitlines(keepends=True):
            line = whole.splitlines()[0]
            if start >= MIN_CONTEXT and len(line) > MIN_LINE:
                drawn = rng.sample(others, min(len(others), 4 * CANDIDATES))
                elsewhere = list(dict.fromkeys(other for j, other in drawn if j != i and other != line))
                if len(elsewhere) >= CANDIDATES - 1:
                    choices = [line, *elsewhere[: CANDIDATES - 1]]
                    rng.shuffle(choices)
                    answer = choices.index(line)
                    yield lambda text=text, end=start, choices=tuple(choices), answer=answer: Choice(
                        prompt=text[:end], choices=choices, answer=answer
                    )
            start += len(whole)
