"""What was claimed of DeepSeek's costs, computed again from sourced inputs; and the scopes nested in one another."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from baleen.config import UserError
from baleen.cost.factors import Factor, Factors, override_factors
from baleen.cost.formula import evaluate
from baleen.cost.money import load_factors


@dataclass(frozen=True)
class Claim:
    """A published figure beside the computed one; `computed` is None where it cannot be derived, and `why` says so."""

    id: str
    label: str
    claimed: float
    computed: float | None
    unit: str
    leaves_out: str
    source: str
    formula: str | None
    why: str | None

    @property
    def relative_error(self) -> float | None:
        return None if self.computed is None else self.computed / self.claimed - 1


@dataclass(frozen=True)
class Scope:
    """What one of the nested scopes takes: (value, low, high) of GPU-hours and of owned dollars."""

    id: str
    label: str
    gpu_hours: tuple[float, float, float]
    owned_usd: tuple[float, float, float]
    note: str


@dataclass(frozen=True)
class Claims:
    claims: tuple[Claim, ...]
    scopes: tuple[Scope, ...]  # smallest first

    def __getitem__(self, claim_id: str) -> Claim:
        return next(claim for claim in self.claims if claim.id == claim_id)

    @property
    def unexplained(self) -> Scope:
        """What the largest scope holds beyond the one inside it, its interval from theirs."""
        inner, outer = self.scopes[-2:]

        def rest(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
            return a[0] - b[0], a[1] - b[2], a[2] - b[1]

        return Scope(
            "unexplained",
            "of which unexplained",
            rest(outer.gpu_hours, inner.gpu_hours),
            rest(outer.owned_usd, inner.owned_usd),
            "other models, serving, High-Flyer's own work, hours without work, years to come: nobody outside knows",
        )


@cache
def _shipped() -> dict[str, Any]:
    return tomllib.loads(resources.files("baleen.cost").joinpath("data/claims.toml").read_text(encoding="utf-8"))


def load_inputs(overrides: Iterable[str] = ()) -> Factors:
    """The inputs of claims.toml and the factors of money.toml; each override is `name=number`. Raises UserError."""
    inputs = {name: Factor(**fields) for name, fields in _shipped()["input"].items()}
    return override_factors({**load_factors(), **inputs}, overrides)


def compute_claims(overrides: Iterable[str] = ()) -> Claims:
    """Every claim and scope, with each override `name=number` put in. Raises UserError if it divides by zero."""
    names: dict[str, float] = {}
    for name, factor in load_inputs(overrides).items():
        names[name] = factor.value
        names[f"{name}_low"], names[f"{name}_high"] = factor.interval
    claims = []
    try:
        for raw in _shipped()["claim"]:
            formula = raw.get("formula")
            computed = None if formula is None else evaluate(formula, names)
            if computed is not None:
                names[raw["id"]] = computed
            claims.append(Claim(computed=computed, **{"formula": None, "why": None, **raw}))
        scopes = [_scope(raw, names) for raw in _shipped()["scope"]]
    except ZeroDivisionError:
        raise UserError("a factor that is divided by was set to 0: give it another value") from None
    return Claims(tuple(claims), tuple(scopes))


def _scope(raw: dict[str, str], names: dict[str, float]) -> Scope:
    def interval(key: str) -> tuple[float, float, float]:
        value = evaluate(raw[key], names)
        low, high = (evaluate(raw.get(f"{key}_{end}", raw[key]), names) for end in ("low", "high"))
        return value, low, high

    label, note = raw["label"].format(**names), raw["note"].format(**names)
    return Scope(raw["id"], label, interval("gpu_hours"), interval("owned_usd"), note)


def claims_dict(overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What `baleen cost claims --json` prints; with overrides, `effects` lists each figure they moved."""
    overrides = tuple(overrides)
    result = compute_claims(overrides)
    out: dict[str, Any] = {
        "claims": [
            {
                "id": c.id,
                "label": c.label,
                "claimed": c.claimed,
                "computed": c.computed,
                "relative_error": c.relative_error,
                "unit": c.unit,
                "leaves_out": c.leaves_out,
                "source": c.source,
                "formula": c.formula,
                "why_not": c.why,
            }
            for c in result.claims
        ],
        "scopes": [_scope_dict(scope) for scope in (*result.scopes, result.unexplained)],
        "set": list(overrides),
    }
    if overrides:
        out["effects"] = effects(compute_claims(), result)
    return out


def effects(before: Claims, after: Claims) -> list[dict[str, Any]]:
    """The claims and scopes whose figure an override moved: {id, before, after}; scopes in owned USD."""
    pairs = [(a.id, a.computed, b.computed) for a, b in zip(before.claims, after.claims, strict=True)]
    pairs += [(a.id, a.owned_usd[0], b.owned_usd[0]) for a, b in zip(before.scopes, after.scopes, strict=True)]
    return [{"id": name, "before": a, "after": b} for name, a, b in pairs if a != b]


def _scope_dict(scope: Scope) -> dict[str, Any]:
    out: dict[str, Any] = {"id": scope.id, "label": scope.label}
    for key in ("gpu_hours", "owned_usd"):
        out[key], out[f"{key}_low"], out[f"{key}_high"] = getattr(scope, key)
    return {**out, "note": scope.note}
