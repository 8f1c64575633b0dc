"""Rates and factors: what an hour costs, where that is known from, and how far it may lie off."""

from dataclasses import replace
from pathlib import Path

import pytest

from baleen.config import UserError
from baleen.cost.factors import Factor, spread
from baleen.cost.money import (
    RateCard,
    load_factors,
    ownership,
    people_usd,
    rate_card,
    recognise,
    whole_project_usd,
)
from baleen.cost.rates import device_rates, rates_view


def at(**values):
    """The shipped factors with some of them set."""
    return load_factors([f"{name}={value}" for name, value in values.items()])


def test_a_cpu_costs_four_cents_an_hour():
    card = rate_card("cpu")
    assert (card.usd_per_device_hour, card.watts_per_device) == (0.04, 3.5)
    assert rate_card("cpu", 0.06).usd_per_device_hour == 0.06
    assert rate_card("cpu", 0.06).source == "given by the user"
    assert rate_card("cpu", 0.06).watts_per_device == 3.5


def test_an_accelerator_is_rented_at_the_middle_of_the_market():
    card = rate_card("h100")
    assert card.usd_per_device_hour == pytest.approx(2.35)
    assert "rental" in card.what and "2026-03" in card.what
    assert card.watts_per_device == pytest.approx(700 * 0.75)


def test_where_nobody_rents_the_rate_is_that_of_owning():
    assert "owning" in rate_card("h20").what


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H800", "h800"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA B200", "b200"),
        ("Quadro 600", None),
    ],
)
def test_names_that_drivers_report(name, device):
    found = recognise(name)
    assert (found.name if found else None) == device


def test_an_unknown_device_needs_a_price():
    with pytest.raises(UserError, match="usd_per_device_hour"):
        rate_card("Quadro 600")
    card = rate_card("Quadro 600", 0.5)
    assert (card.usd_per_device_hour, card.watts_per_device) == (0.5, None)


def test_ownership_by_hand():
    factors = at(
        server_overhead=1, network_share=0.5, amortisation_years=4, depreciation_per_year=1, cost_of_capital=0,
        server_power_overhead=2, draw_share=0.5, pue=1.2, electricity_usd_per_kwh=0.1, colocation_usd_per_kw_month=73,
        utilisation=0.5,
    )  # fmt: skip
    cost = ownership(17520, 500, factors)
    assert cost.capital == pytest.approx(17520 / 0.5 / 4 / 8760)  # a dollar
    assert cost.colocation == pytest.approx(1.0 * 73 * 12 / 8760)
    assert cost.electricity == pytest.approx(1.0 * 0.5 * 1.2 * 0.1)
    assert cost.idle == pytest.approx(cost.capital + cost.colocation)
    assert cost.usd_per_hour == pytest.approx(2 * 1.1 + 0.06)


def test_what_is_left_at_the_end_and_the_price_of_money_both_count():
    plain = at(depreciation_per_year=1, cost_of_capital=0)
    assert (
        ownership(1e4, 700, at(depreciation_per_year=0.3, cost_of_capital=0)).capital
        < ownership(1e4, 700, plain).capital
    )
    assert (
        ownership(1e4, 700, at(depreciation_per_year=1, cost_of_capital=0.1)).capital
        > ownership(1e4, 700, plain).capital
    )


@pytest.mark.parametrize("bad", ["utilisation=0", "utilisation=2", "network_share=1", "amortisation_years=0"])
def test_impossible_factors_are_mistakes(bad):
    with pytest.raises(UserError):
        ownership(1e4, 700, load_factors([bad]))


def test_every_factor_has_a_source_and_lies_in_its_interval():
    for name, factor in load_factors().items():
        low, high = factor.interval
        assert low <= factor.value <= high, name
        assert factor.unit and factor.source and factor.date, name


def test_spread_combines_independent_errors():
    factor = Factor(10.0, "", "s", "d", low=7.0, high=13.0)
    factors = {"a": factor, "b": replace(factor, low=6.0, high=14.0), "c": Factor(5.0, "", "s", "d")}
    low, high, swings = spread(lambda f: f["a"].value + f["b"].value + f["c"].value, factors)
    assert (low, high) == (pytest.approx(20), pytest.approx(30))
    assert swings == {"a": (22.0, 28.0), "b": (21.0, 29.0)}


def test_people_and_whole_projects():
    factors = at(people_usd_per_year=100_000)
    assert people_usd(3, 0.5, factors) == 150_000
    assert whole_project_usd(10.0, load_factors()) == pytest.approx((15, 56, 100))


def test_renting_and_owning_stand_side_by_side():
    rates = device_rates("h800")
    assert (rates["rent"]["low"], rates["rent"]["high"]) == (2.0, 3.42)
    own = rates["own"]
    assert sum(own["parts"].values()) == pytest.approx(own["usd_per_hour"])
    assert own["low"] < own["usd_per_hour"] < own["high"]
    assert "total" not in rates
    dearer = device_rates("h800", ["electricity_usd_per_kwh=0.2"])["own"]
    assert dearer["usd_per_hour"] > own["usd_per_hour"]
    assert "electricity_usd_per_kwh" not in dearer["swings"]
    assert device_rates("cpu")["rent"] == {
        "low": 0.03,
        "high": 0.05,
        "source": load_factors()["cpu_usd_per_hour"].source,
    }
    assert rates_view(rates).renderables


def test_absurd_prices_are_mistakes():
    with pytest.raises(UserError, match="absurd"):
        device_rates("h800", (), -5)
    with pytest.raises(UserError, match="unknown hardware"):
        device_rates("h8000")
    with pytest.raises(UserError, match="no price"):
        device_rates("gb300")
    with pytest.raises(UserError, match="absurd"):
        RateCard(1.0, "", "", watts_per_device=-1)


def test_the_docs_list_every_factor_as_it_is():
    text = (Path(__file__).parents[2] / "docs" / "cost-method.md").read_text(encoding="utf-8")
    for name, factor in load_factors().items():
        low, high = factor.interval
        row = f"| `{name}` | {factor.value:g} | {low:g} to {high:g} | {factor.unit} | {factor.citation} |"
        assert row in text, f"docs/cost-method.md lacks: {row}"


def test_the_docs_quote_the_cost_of_owning_an_h800():
    own = device_rates("h800")["own"]
    text = (Path(__file__).parents[2] / "docs" / "cost-method.md").read_text(encoding="utf-8")
    assert f"${own['usd_per_hour']:.2f} an hour (${own['low']:.2f} to ${own['high']:.2f})" in text
