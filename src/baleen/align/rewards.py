"""Rewards by rules: pure functions (prompt, completion, answer) -> float, in R1's manner without any neural judge.

A completion is all that the assistant said, `<think>` included. Every verifier reads the answer in the one way of
`answer_of`; `answer` is what the task says is right, in the verifier's own form.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from baleen.config import UserError
from baleen.infer.answers import answer_of

Reward = Callable[[str, str, str], float]
FORMAT = re.compile(r"\s*<think>(?P<thought>.+?)</think>\s*<answer>(?P<answer>.+?)</answer>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")
LONG = 200  # characters at which `length` is full
EXPRESSION = re.compile(r"(?P<expression>[\d+\-*/() ]{1,200})(?:= *(?P<value>\d{1,20}))?", re.ASCII)  # of countdown


def number(prompt: str, completion: str, answer: str) -> float:
    """1 if the answer is exactly that number: 7, -7, 7.0, 14/2 are the same, "about 7" is not."""
    found, right = _fraction(answer_of(completion)), _fraction(answer)
    return float(found is not None and found == right)


def expression(prompt: str, completion: str, answer: str) -> float:
    """1 if the answer is the same mathematical expression, by math-verify: x*(x+1) is x^2+x."""
    verifier, found = math_verify(), answer_of(completion)
    if found is None:
        return 0.0
    return float(verifier.verify(verifier.parse(f"${answer}$"), verifier.parse(f"${found}$")))


def math_verify() -> Any:
    """The package. Raises UserError where it is missing."""
    try:
        return importlib.import_module("math_verify")
    except ModuleNotFoundError:
        raise UserError("the reward 'expression' needs math-verify: pip install 'baleen-lm[rl]'") from None


def countdown(prompt: str, completion: str, answer: str) -> float:
    """1 if the answer is an expression that makes the target with the given numbers, each used once at most.

    answer: JSON [target, [numbers]].
    """
    target, numbers = json.loads(answer)
    match = EXPRESSION.fullmatch((answer_of(completion) or "").strip())
    if match is None or (match["value"] and int(match["value"]) != target):
        return 0.0
    try:
        used: list[int] = []
        value = _evaluate(ast.parse(match["expression"].strip(), mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return 0.0
    return float(value == target and not Counter(used) - Counter(numbers))


def sorting(prompt: str, completion: str, answer: str) -> float:
    """1 if the answer is the same numbers in the same order, however they are set apart."""
    found = answer_of(completion)
    if found is None or re.search(r"[^\d\s,;\-\[\]]", found):
        return 0.0
    return float(re.findall(r"-?\d+", found) == re.findall(r"-?\d+", answer))


def json_value(prompt: str, completion: str, answer: str) -> float:
    """1 if the answer is JSON of the same value as `answer`: 1 is 1.0, but not true."""
    try:
        return float(_equal(json.loads(answer_of(completion) or ""), json.loads(answer)))
    except (ValueError, RecursionError):  # also a number of too many digits
        return 0.0


def format_(prompt: str, completion: str, answer: str) -> float:
    """1 for <think>...</think><answer>...</answer>, both filled and nothing else. Says nothing of the truth."""
    match = FORMAT.fullmatch(completion)
    filled = match is not None and bool(match["thought"].strip()) and bool(match["answer"].strip())
    return float(filled and len(TAG.findall(completion)) == 4)


def language(prompt: str, completion: str, answer: str) -> float:
    """Share of the letters of the completion that are in the script of most of the prompt's (R1's consistency)."""
    spoken, asked = Counter(_scripts(TAG.sub("", completion))), Counter(_scripts(prompt))
    if not spoken or not asked:
        return 1.0
    return spoken[asked.most_common(1)[0][0]] / spoken.total()


def length(prompt: str, completion: str, answer: str) -> float:
    """Characters over LONG, at most 1. Alone it is an invitation to ramble; a negative weight makes answers short."""
    return min(1.0, len(completion) / LONG)


REWARDS: dict[str, Reward] = {
    "number": number,
    "expression": expression,
    "countdown": countdown,
    "sorting": sorting,
    "json": json_value,
    "format": format_,
    "language": language,
    "length": length,
}


def _fraction(text: str | None) -> Fraction | None:
    if text is None or not re.fullmatch(r"[+-]?\d{1,400}(\.\d{1,400}|/\d{1,400})?", text.strip(), re.ASCII):
        return None
    try:
        return Fraction(text.strip())
    except ZeroDivisionError:
        return None


def _equal(one: Any, other: Any) -> bool:
    """As JSON; to Python True is 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _evaluate(node: ast.AST, used: list[int]) -> Fraction:
    """Value of + - * / over whole numbers; the numbers are added to `used`. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, used), _evaluate(node.right, used)
        operations: dict[type, Callable[[Any, Any], Fraction]] = {
            ast.Add: lambda a, b: a + b,
            ast.Sub: lambda a, b: a - b,
            ast.Mult: lambda a, b: a * b,
            ast.Div: lambda a, b: a / b,
        }
        if type(node.op) in operations:
            return operations[type(node.op)](left, right)
    raise ValueError("only + - * / of whole numbers count")


def _scripts(text: str) -> list[str]:
    """The script of each letter: LATIN, GREEK, CJK (with the kana that Japanese writes beside it), ..."""
    names = [unicodedata.name(character, "UNKNOWN").split() for character in text if character.isalpha()]
    scripts = [name[1] if name[0] in ("FULLWIDTH", "HALFWIDTH") else name[0] for name in names]
    return ["CJK" if script.startswith(("HIRAGANA", "KATAKANA")) else script for script in scripts]
