"""Every layout trains the model that one process trains, and continues what any other has saved."""

import json
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("drive_layouts.py")
RECOMPUTE = ["norm", "up_projection", "swiglu"]
ON_2 = [
    {"zero": 0},
    {"zero": 1},
    {"zero": 2},
    {"zero": 3},
    {"expert": 2},
    {"expert": 2, "zero": 3, "recompute": RECOMPUTE},
    {"pipeline": 2, "schedule": "1f1b"},
    {"pipeline": 2, "schedule": "zbv", "recompute": RECOMPUTE},
    {"pipeline": 2, "schedule": "dualpipev"},
]
ON_4 = [
    {"expert": 4},
    {"expert": 2, "zero": 0},
    {"expert": 2, "zero": 3},
    {"shard": 2, "zero": 3},
    {"shard": 2, "expert": 2, "zero": 1},
    {"pipeline": 4, "schedule": "1f1b"},
    {"pipeline": 2, "expert": 2, "schedule": "1f1b"},
    {"pipeline": 2, "expert": 2, "schedule": "zbv"},
    {"pipeline": 2, "expert": 2, "schedule": "dualpipev"},
    {"pipeline": 2, "zero": 0, "schedule": "dualpipev"},
]
pytestmark = pytest.mark.slow


def last_json(done):
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def runs(torchrun, tmp_path_factory):
    """{world: what the driver told}; the runs on 4 processes continue the checkpoints of 2 as well."""
    folder = tmp_path_factory.mktemp("layouts")
    worlds = {2: ON_2, 4: ON_4}
    return {n: last_json(torchrun(n, DRIVER, folder, "fp64", *map(json.dumps, ls))) for n, ls in worlds.items()}


def test_losses_and_gradient_norm_equal_one_process(runs):
    checked = 0
    for told in runs.values():
        for layout, found in told["layouts"].items():
            assert len(found["rows"]) == 20
            for row, expected in zip(found["rows"], told["reference"], strict=True):
                assert row == pytest.approx(expected, rel=1e-9, abs=0), layout
                checked += 1
    assert checked == 20 * (len(ON_2) + len(ON_4))


def test_biases_are_equal_bit_for_bit(runs):
    assert all(found["bias_equal"] for told in runs.values() for found in told["layouts"].values())


def test_any_layout_continues_any_other(runs):
    for told, sources in zip(runs.values(), (len(ON_2), len(ON_2) + len(ON_4)), strict=True):
        for layout, found in told["layouts"].items():
            assert len(found["continued"]) == sources
            for source, rows in found["continued"].items():
                for row, expected in zip(rows, told["reference"][3:5], strict=True):
                    assert row == pytest.approx(expected, rel=1e-9, abs=0), f"{source} continued as {layout}"


def test_float32_stays_close(torchrun, tmp_path):
    told = last_json(torchrun(2, DRIVER, tmp_path, "fp32", json.dumps({"expert": 2})))
    (found,) = told["layouts"].values()
    for row, expected in zip(found["rows"], told["reference"], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
