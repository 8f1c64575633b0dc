"""Every claim comes out of its inputs, and the picture in docs/ is the one the claims give."""

import io
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baleen.config import UserError
from baleen.cost.claims import claims_dict, compute_claims, load_inputs
from baleen.cost.claims_table import claims_markdown, claims_view
from baleen.cost.formula import evaluate, names_in
from baleen.cost.money import load_factors
from baleen.cost.scopes import scopes_svg
from baleen.recipe import load_recipe

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def claims():
    return compute_claims()


@pytest.mark.parametrize(
    ("claim_id", "expected", "tolerance"),
    [
        ("v3_hours", 2.788e6, 0),
        ("v3_headline", 5.576e6, 0),
        ("v3_pretrain_hours", 2.6666e6, 1e-4),
        ("v3_tokens_per_day", 272.80e9, 1e-5),
        ("v3_tflops", 386.04, 1e-4),
        ("r1_hours", 147e3, 0),
        ("r1_usd", 294e3, 0),
        ("fleet_capex", 1_628.56e6, 1e-6),
        ("fleet_total_beside", 2_572.56e6, 1e-6),
        ("fleet_opex_derived", 582.6e6, 1e-4),
        ("owned_h800_hour", 1.3545, 1e-4),
        ("v3_share_of_fleet_year", 0.0053044, 1e-4),
        ("ff_total_price_ratio", 11600 / 23000, 1e-12),
        ("ff_gemm_ratio", 220 / 263, 1e-12),
        ("ff_pflops", 1560, 0),
        ("day6_cost", 87072, 0),
        ("day6_margin", 5.4547, 1e-4),
        ("olmo3_multiplier", 5.618, 1e-4),
    ],
)
def test_known_figures(claims, claim_id, expected, tolerance):
    assert claims[claim_id].computed == pytest.approx(expected, rel=tolerance or 1e-12)


def test_errors_are_those_of_the_sources(claims):
    errors = {claim.id: claim.relative_error for claim in claims.claims}
    assert {name for name, error in errors.items() if error is None} == {
        "spent_on_ai",
        "salaries",
        "gpt4",
        "ff_utilisation",
    }
    assert {name for name, error in errors.items() if error is not None and abs(error) > 0.02} == {
        "r1_press",
        "fleet_opex_derived",
        "fleet_total_inside",
    }


def test_a_claim_is_derived_or_says_why_not(claims):
    for claim in claims.claims:
        assert (claim.formula is None) != (claim.why is None), claim.id
        assert claim.leaves_out and claim.source and claim.unit
    assert len({claim.id for claim in claims.claims}) == len(claims.claims) >= 30


def test_every_input_is_used_and_has_a_source(claims):
    inputs = load_inputs()
    used = set().union(*(names_in(claim.formula) for claim in claims.claims if claim.formula))
    assert set(inputs) - set(load_factors()) <= used
    assert all(factor.source and factor.date for factor in inputs.values())


def test_counted_flops_agree_with_the_counter():
    from baleen.cost.architecture import from_model_config
    from baleen.cost.flops import training_flops

    counted = training_flops(from_model_config(load_recipe("v3-671b").model), 4096)
    assert load_inputs()["v3_gflops_per_token"].value == pytest.approx(counted / 1e9, abs=0.05)


def test_scopes_lie_one_inside_the_other(claims):
    for inner, outer in zip(claims.scopes, claims.scopes[1:], strict=False):
        assert inner.gpu_hours[0] < outer.gpu_hours[0]
        assert inner.owned_usd[0] < outer.owned_usd[0]
    final, _, research, fleet = claims.scopes
    assert final.owned_usd[0] == pytest.approx(2.788e6 * claims["owned_h800_hour"].computed)
    assert research.gpu_hours == pytest.approx((2.935e6 * 5.6, 2.935e6 * 1.5, 2.935e6 * 10))
    rest = claims.unexplained
    assert rest.gpu_hours[0] + research.gpu_hours[0] == pytest.approx(fleet.gpu_hours[0])
    assert rest.owned_usd[1] == pytest.approx(claims["fleet_capex"].computed - research.owned_usd[2])
    assert rest.owned_usd[1] < rest.owned_usd[0] < rest.owned_usd[2]


def test_no_scope_rents(claims):
    """Renting and owning are never added up: no scope moves with the rent."""
    moved = claims_dict(["h800_rent_usd=4"])["effects"]
    assert {row["id"] for row in moved} == {"v3_headline", "r1_usd", "r1_press", "day6_cost", "day6_margin"}


def test_one_factor_can_be_changed():
    result = claims_dict(["research_multiplier=3"])
    assert [row["id"] for row in result["effects"]] == ["with_research"]
    scope = next(scope for scope in result["scopes"] if scope["id"] == "with_research")
    assert scope["gpu_hours"] == scope["gpu_hours_low"] == pytest.approx(3 * 2.935e6)
    assert "x 3 " in scope["note"]
    assert "effects" not in claims_dict()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reserch_multiplier=3", "did you mean 'research_multiplier'"),
        ("fleet_years", "write name=number"),
        ("fleet_years=four", "write name=number"),
        ("fleet_years=-1", "not negative"),
        ("fleet_years=nan", "not negative"),
        ("fleet_years=0", "divided by"),
    ],
)
def test_bad_overrides_are_mistakes(override, message):
    with pytest.raises(UserError, match=message):
        compute_claims([override])


def test_the_picture_is_well_formed_and_current(claims):
    svg = scopes_svg(claims)
    root = ET.fromstring(svg)
    boxes = [(r.get("class"), float(r.get("width") or 0)) for r in root.iter("{http://www.w3.org/2000/svg}rect")]
    sides = dict(boxes[:5])
    assert (sides["research"] / sides["fleet"]) ** 2 == pytest.approx(16.436e6 / 2102.4e6, rel=0.01)
    assert "prefers-color-scheme: dark" in svg
    assert (DOCS / "scopes.svg").read_text(encoding="utf-8") == svg, "run: baleen cost claims --svg docs/scopes.svg"


def test_the_table_and_the_picture_stand_in_the_readme(claims):
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert claims_markdown(claims) in readme, "run: baleen cost claims --markdown"
    assert f"All {len(claims.claims)} claims" in readme
    assert "](docs/scopes.svg)" in readme


def test_the_view_names_every_claim(claims):
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(claims_view(claims, ["research_multiplier=5.6"]))
    text = console.export_text()
    assert all(claim.label in text for claim in claims.claims)
    assert "unexplained" in text


@given(st.text(max_size=30))
def test_a_formula_is_arithmetic_or_an_error(text):
    try:
        value = evaluate(text, {"a": 2.0})
    except (ValueError, SyntaxError, ZeroDivisionError, MemoryError, RecursionError):
        return
    assert isinstance(value, float)


@pytest.mark.parametrize("text", ["__import__('os')", "a.b", "[1]", "a ** 2", "f(1)", "True", "'x'", "1 if a else 2"])
def test_a_formula_runs_no_code(text):
    with pytest.raises(ValueError, match="formula"):
        evaluate(text, {"a": 1.0})


def test_arithmetic():
    assert evaluate("-(a + 1) * 3 / (b - 1)", {"a": 1.0, "b": 4.0}) == -2
    assert names_in("a * (b + 2)") == {"a", "b"}
