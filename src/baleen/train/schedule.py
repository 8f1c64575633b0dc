"""Schedules as data: piecewise curves over tokens (V3 §4.2), each a factor on a base value of the recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence

from baleen.recipe import Knot, Recipe, knot_position


class Curve:
    """Knots (when, factor, shape), `when` in tokens: the factor runs from knot to knot, constant beyond both ends."""

    def __init__(self, knots: Sequence[Knot], total_tokens: int):
        self.knots = [(knot_position(k[0], total_tokens), k[1], k[2] if len(k) > 2 else "linear") for k in knots]
        self.knots.sort(key=lambda knot: knot[0])  # stable: of two knots at one place the later one wins

    def __call__(self, tokens: float) -> float:
        before = [knot for knot in self.knots if knot[0] <= tokens]
        if not before:
            return self.knots[0][1]
        if len(before) == len(self.knots):
            return before[-1][1]
        (start, low, _), (end, high, shape) = before[-1], self.knots[len(before)]
        share = (tokens - start) / (end - start)
        if shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return low + (high - low) * share


class Schedules:
    """All scheduled values of a recipe at a point of the run, counted in tokens."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        curves = {name: getattr(recipe.schedule, name) for name in type(recipe.schedule).model_fields}
        self.curves = {name: Curve(knots, recipe.train.tokens) for name, knots in curves.items()}

    def lr(self, tokens: float) -> float:
        return self.recipe.train.lr * self.curves["lr"](tokens)

    def bias_update_speed(self, tokens: float) -> float:
        return self.recipe.train.bias_update_speed * self.curves["bias_update_speed"](tokens)

    def mtp_loss_weight(self, tokens: float) -> float:
        return self.recipe.train.mtp_loss_weight * self.curves["mtp_loss_weight"](tokens)

    def batch_sequences(self, tokens: float, multiple: int = 1) -> int:
        """Sequences of the next step, to the nearest multiple, at least one."""
        return self._sequences(self.curves["batch_tokens"](tokens), multiple)

    def smallest_batch(self, multiple: int = 1) -> int:
        """Sequences of the smallest step: at a knot, for between two of them a curve neither rises nor falls alone."""
        return self._sequences(min(factor for _, factor, _ in self.curves["batch_tokens"].knots), multiple)

    def largest_batch(self, multiple: int = 1) -> int:
        return self._sequences(max(factor for _, factor, _ in self.curves["batch_tokens"].knots), multiple)

    def _sequences(self, factor: float, multiple: int) -> int:
        sequences = self.recipe.train.batch_tokens * factor / self.recipe.train.seq_len
        return multiple * max(1, round(sequences / multiple))
