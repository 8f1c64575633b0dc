"""Questions without end whose answers can be checked: what a model is taught to reason on.

A task makes questions from a random stream; `worked` is a solution in words, for cold starts, written with care or
in haste. Whether a question is for training or for testing is decided by a hash of what is asked, the order of its
numbers aside where that changes nothing, so the two sets share none, whatever the seeds.
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from baleen.config import Strict, UserError

Split = Literal["train", "test"]
TEST_SHARE = 8  # one question in so many is for testing
PATIENCE = 20_000  # questions drawn in vain before a task counts as exhausted
# fmt: off
WORDS = (
    "anchor", "albatross", "baleen", "barnacle", "compass", "current", "dolphin", "driftwood", "estuary", "glacier",
    "harbour", "horizon", "iceberg", "jellyfish", "kelp", "krill", "lagoon", "lantern", "lobster", "mussel", "narwhal",
    "ocean", "octopus", "pebble", "pelican", "penguin", "plankton", "sailor", "seashell", "starfish", "walrus", "whale",
)
# fmt: on

Level = Annotated[int, Field(ge=1, le=1000)]


def _ascending(limits: tuple[int, int]) -> tuple[int, int]:
    if limits[0] > limits[1]:
        raise ValueError(f"{list(limits)}: write the fewest first, then the most")
    return limits


Limits = Annotated[tuple[Level, Level], AfterValidator(_ascending)]


@dataclass(frozen=True)
class Question:
    """`answer` is what the verifier is given; `worked` and `solution` are the thought and the words that solve it.

    The thought is in pieces, of which every second is an intermediate result: one that can be left out.
    """

    prompt: str
    answer: str
    verifier: str  # a name of rewards.REWARDS, or reasoning_gym:TASK
    worked: tuple[str, ...]
    solution: str
    key: str = ""  # what is asked, in one form for all its wordings; empty: the prompt

    @property
    def completion(self) -> str:
        """The worked solution as an assistant's turn."""
        return f"<think>{''.join(self.worked)}</think><answer>{self.solution}</answer>"

    def hasty(self) -> Question:
        """As someone in a hurry works it out, who writes no intermediate result down."""
        return replace(self, worked=("".join(self.worked[::2]),))

    @property
    def asked(self) -> str:
        return self.key or self.prompt

    @property
    def is_for_testing(self) -> bool:
        return int.from_bytes(blake2b(self.asked.encode(), digest_size=8).digest()) % TEST_SHARE == 0


class ChainSum(Strict):
    """`3+8-2=`: the thought is one operation after the other, `3+8=11 11-2=9`; no partial sum is negative.

    Of more digits, one place of a number after the other: `65+58=115+8=123`. Without the intermediate results it takes
    everything at once: `3+8-2=9`.
    """

    name: Literal["chain_sum"] = "chain_sum"
    terms: Limits = (2, 5)  # fewest and most
    digits: Annotated[int, Field(ge=1, le=6)] = 1

    def question(self, rng: random.Random) -> Question:
        smallest, largest = 10 ** (self.digits - 1), 10**self.digits - 1
        total = rng.randint(smallest, largest)
        prompt, worked = str(total), [str(total)]
        for place in range(_within(rng, self.terms) - 1):
            term = rng.randint(smallest, largest)
            minus = term <= total and rng.random() < 0.5
            if place:
                worked[-1] += f"={total} {total}"
                worked += [""]
            by_place, total = _place_by_place(total, -term if minus else term)
            prompt += f"{'-' if minus else '+'}{term}"
            worked[-1] += f"{'-' if minus else '+'}{term}"
            worked += [by_place]
        worked += [f"={total}"] if len(worked) % 2 == 0 else ["", f"={total}"]
        return Question(f"{prompt}=", str(total), "number", tuple(worked), str(total))


def _place_by_place(total: int, term: int) -> tuple[str, int]:
    """What stands between 65+58 and its result, and that: (`=115+8`, 123)."""
    sign, left, between = "-" if term < 0 else "+", str(abs(term)), ""
    while len(left) > 1:
        first, left = left[0] + "0" * (len(left) - 1), left[1:].lstrip("0")
        total += int(sign + first)
        between += f"={total}{sign}{left}" if left else ""
    return between, total + int(sign + (left or "0"))


class Countdown(Strict):
    """Reach a target from given numbers, each used once at most: the thought is the way the target was made."""

    name: Literal["countdown"] = "countdown"
    numbers: Limits = (3, 3)  # fewest and most
    largest: Annotated[int, Field(ge=2, le=100)] = 10

    def question(self, rng: random.Random) -> Question:
        given = [rng.randint(1, self.largest) for _ in range(_within(rng, self.numbers))]
        value, expression, worked = given[0], str(given[0]), [str(given[0])]
        for place, number in enumerate(given[1:]):
            operators = ["+", "*"] + ["-"] * (value > number) + ["/"] * (value % number == 0)
            operator = rng.choice(operators)
            result = {"+": value + number, "-": value - number, "*": value * number, "/": value // number}[operator]
            if place:
                worked += [f"={value} {value}", ""]
            worked[-1] += f"{operator}{number}"
            inner = f"({expression})" if operator in "*/" and not expression.isdigit() else expression
            value, expression = result, f"{inner}{operator}{number}"
        worked[-1] += f"={value}"
        shown = " ".join(map(str, rng.sample(given, len(given))))
        prompt = f"Make {value} from {shown}"
        key = f"{value} from {sorted(given)}"
        return Question(prompt, json.dumps([value, given]), "countdown", tuple(worked), expression, key)


class Comparison(Strict):
    """The larger of two numbers of the same length: the thought is the first digits that differ."""

    name: Literal["comparison"] = "comparison"
    digits: Limits = (2, 6)

    def question(self, rng: random.Random) -> Question:
        digits = _within(rng, self.digits)
        one, two = (rng.randint(10 ** (digits - 1), 10**digits - 1) for _ in range(2))
        if one == two:
            two = one - 1 if one % 10 else one + 1
        a, b = next((a, b) for a, b in zip(str(one), str(two), strict=True) if a != b)
        larger = str(max(one, two))
        return Question(
            f"{one} or {two}, which is larger?",
            larger,
            "number",
            (f"{a}{'>' if a > b else '<'}{b}",),
            larger,
            key=f"{min(one, two)} or {max(one, two)}",
        )


class LetterCounting(Strict):
    """How often a letter stands in a word: the thought spells the word, counting."""

    name: Literal["letter_counting"] = "letter_counting"
    words: Limits = (1, 2)  # joined by spaces

    def question(self, rng: random.Random) -> Question:
        text = " ".join(rng.choice(WORDS) for _ in range(_within(rng, self.words)))
        letter = rng.choice(text.replace(" ", ""))
        count, spelled = 0, [text[0]]
        for before, character in pairwise(text):
            count += before == letter
            spelled += [str(count), f" {character}"]
        count += text[-1] == letter
        spelled[-1] += str(count)
        prompt, key = f'How many "{letter}" are in "{text}"?', f"{letter} in {sorted(text.split())}"
        return Question(prompt, str(count), "number", tuple(spelled), str(count), key)


class Sorting(Strict):
    """Numbers in ascending order: the thought takes the least, again and again, and writes down what is left.

    Of more than one term they are sums, and the thought is first what each comes to: `4+9=13\n8-3=5\nSo 5 13`.
    """

    name: Literal["sorting"] = "sorting"
    numbers: Limits = (3, 6)
    digits: Annotated[int, Field(ge=1, le=6)] = 1
    terms: Limits = (1, 1)  # of each number, fewest and most

    def question(self, rng: random.Random) -> Question:
        count = _within(rng, self.numbers)
        return self._of_numbers(rng, count) if self.terms == (1, 1) else self._of_sums(rng, count)

    def _of_numbers(self, rng: random.Random, count: int) -> Question:
        left = [rng.randint(0, 10**self.digits - 1) for _ in range(count)]
        prompt, ordered = f"Sort {' '.join(map(str, left))}", sorted(left)
        worked = [str(ordered[0])]
        for number, following in pairwise(ordered):
            left.remove(number)
            worked += [f":{' '.join(map(str, left))}", f"\n{following}"]
        solution = " ".join(map(str, ordered))
        return Question(prompt, solution, "sorting", tuple(worked), solution, key=f"Sort {solution}")

    def _of_sums(self, rng: random.Random, count: int) -> Question:
        term = ChainSum(terms=self.terms, digits=self.digits)
        sums = [term.question(rng) for _ in range(count)]
        asked = [one.prompt.removesuffix("=") for one in sums]
        solution = " ".join(map(str, sorted(int(one.answer) for one in sums)))
        worked = ("", "".join(f"{''.join(one.worked)}\n" for one in sums), f"So {solution}")
        key = f"Sort {' '.join(sorted(asked))}"
        return Question(f"Sort {' '.join(asked)}", solution, "sorting", worked, solution, key)


class ReasoningGym(Strict):
    """Any task of the package reasoning-gym, with its own verifier; it brings answers, but no worked solutions."""

    name: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    options: dict[str, Any] = {}

    def question(self, rng: random.Random) -> Question:
        made = {"seed": rng.randrange(2**31), "options": self.options}
        try:
            entry = gym_entry(self.task, **made)
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(f"reasoning-gym cannot make the task {self.task!r}: {error}") from None
        # Its verifier wants more than text can carry, tuples for one, so it makes the question once more.
        return Question(entry["question"], json.dumps(made), f"reasoning_gym:{self.task}", (), str(entry["answer"]))


Task = Annotated[
    ChainSum | Countdown | Comparison | LetterCounting | Sorting | ReasoningGym, Field(discriminator="name")
]


def questions(tasks: Sequence[Task], split: Split, seed: int) -> Iterator[Question]:
    """An endless stream of questions of that split; the same for the same seed. Training questions may come again.

    Raises UserError if the tasks have no question of that split.
    """
    rng = random.Random(f"{split} {seed}")
    in_vain = 0
    while in_vain < PATIENCE:
        question = rng.choice(tasks).question(rng)
        if question.is_for_testing == (split == "test"):
            in_vain = 0
            yield question
        else:
            in_vain += 1
    raise UserError(f"the tasks have no question for the split {split!r}: make them harder, or more varied")


def distinct_questions(
    tasks: Sequence[Task], split: Split, seed: int, count: int, *, or_fewer: bool = False
) -> list[Question]:
    """`count` different questions; for testing, one that is only worded otherwise is no other.

    Raises UserError if the tasks have fewer, unless or_fewer.
    """
    found: dict[str, Question] = {}  # by prompt, or by what is asked
    in_vain = 0
    stream = questions(tasks, split, seed)
    while len(found) < count and in_vain < PATIENCE:
        question = next(stream)
        name = question.asked if split == "test" else question.prompt
        in_vain = in_vain + 1 if name in found else 0
        found.setdefault(name, question)
    if len(found) < count and not or_fewer:
        raise UserError(
            f"the tasks have about {len(found)} questions for the split {split!r}, fewer than {count}: ask for fewer, "
            "or make the tasks harder"
        )
    return list(found.values())


def _within(rng: random.Random, limits: tuple[int, int]) -> int:
    return rng.randint(*limits)


def gym_entry(task: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """{question, answer, metadata} of one question of reasoning-gym. Raises UserError where that is not installed."""
    try:
        gym = importlib.import_module("reasoning_gym")
    except ModuleNotFoundError:
        raise UserError("tasks of reasoning-gym need that package: pip install 'baleen-lm[rl]'") from None
    return gym.create_dataset(task, size=1, seed=seed, **options)[0]
