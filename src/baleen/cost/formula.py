"""Arithmetic over named numbers, so that a figure's derivation can stand in a data file beside its sources."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(formula: str, names: Mapping[str, float]) -> float:
    """`formula` of + - * /, parentheses, numbers and `names`. Raises ValueError on anything else, ZeroDivisionError."""
    return _value(ast.parse(formula, mode="eval").body, names)


def names_in(formula: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(formula, mode="eval")) if isinstance(node, ast.Name)}


def _value(node: ast.expr, names: Mapping[str, float]) -> float:
    match node:
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, names), _value(right, names))
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand, names)
        case ast.Constant(value) if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        case ast.Name(name) if name in names:
            return names[name]
        case ast.Name(name):
            raise ValueError(f"unknown name {name!r} in a formula")
    raise ValueError(f"a formula may hold + - * /, numbers and names only, not {ast.unparse(node)!r}")
