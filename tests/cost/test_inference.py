import pytest

from baleen.cost.architecture import from_dims, from_model_config
from baleen.cost.claims import load_inputs
from baleen.cost.factors import factor_table, override_factors
from baleen.cost.hardware import find_hardware
from baleen.cost.inference import decode_bound, delivered_shares, serving_cost, serving_unit
from baleen.recipe import load_recipe

V3 = from_model_config(load_recipe("v3-671b").model)
LLAMA_70B = from_dims({"L": 80, "d": 8192, "V": 128256, "H": 64, "KV": 8, "hd": 128, "ff": 28672})


def test_the_rates_of_a_node_explain_the_number_of_nodes():
    """Two published figures that need not agree: nodes by tokens over rates, and nodes as counted."""
    told, rates = load_inputs(), factor_table("serving")
    prefill = told["day6_input_tokens"].value / rates["prefill_tokens_per_node_second"].value / 86400
    decode = told["day6_output_tokens"].value / rates["decode_tokens_per_node_second"].value / 86400
    assert (prefill, decode) == pytest.approx((95.5, 131.4), abs=0.05)
    assert prefill + decode == pytest.approx(told["day6_nodes"].value, rel=2e-3)


def test_v3_on_h800_repeats_day_6():
    cost = serving_cost(V3, find_hardware("h800"), "fp8", (2.0, 2.0, 2.0), node_limit=4)
    assert cost["prefill"]["usd_per_million_tokens"]["mid"] == pytest.approx(16 / 3600 / 73700 * 1e6)
    assert cost["decode"]["usd_per_million_tokens"]["mid"] == pytest.approx(16 / 3600 / 14800 * 1e6)


def test_a_service_stays_below_its_bound():
    assert delivered_shares() == pytest.approx((0.28, 0.35), abs=0.005)  # as docs/cost-method.md has them


def test_a_unit_is_as_large_as_the_model_asks():
    tiny = from_model_config(load_recipe("cpu-s").model)
    h100 = find_hardware("h100")
    assert serving_unit(tiny, h100, "bf16", 144, 32, 0.9).layout.devices == 1
    assert serving_unit(LLAMA_70B, h100, "bf16", 144, 32, 0.9).layout.tensor == 4
    spread = serving_unit(V3, h100, "fp8", 144, 32, 0.9)
    # By hand: everything but the experts, and two of 256 experts in each of 58 layers.
    assert spread.weight_bytes == pytest.approx(671.026e9 - 58 * 254 * 3 * 7168 * 2048, rel=1e-4)


def test_a_model_that_no_unit_holds_says_so():
    assert "RTX 4090" in serving_cost(V3, find_hardware("rtx4090"), "fp8", (1.0, 1.0, 1.0))["why_not"]


def test_longer_caches_and_faster_streams_cost_throughput():
    h800 = find_hardware("h800")
    unit = serving_unit(V3, h800, "fp8", 144, 32, 0.9)
    rates = [
        decode_bound(V3, h800, "fp8", unit, context, speed, 0.9).tokens_per_second
        for context, speed in ((2000, 21), (4989, 21), (4989, 40), (32000, 40))
    ]
    assert rates == sorted(rates, reverse=True) and rates[0] > 2 * rates[3]
    assert decode_bound(V3, h800, "fp8", unit, 4989, 10_000, 0.9) is None


def test_what_day_6_delivered_is_a_factor():
    factors = override_factors(factor_table("serving"), ["decode_tokens_per_node_second=7400"])
    assert delivered_shares(factors)[1] == pytest.approx(delivered_shares()[1] / 2)
