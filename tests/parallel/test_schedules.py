"""The schedules that PyTorch runs, over sleeping stages, beside those that the cost engine simulates."""

import json
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from baleen.cost.schedule import Op, schedule
from baleen.cost.simulator import Durations, execute

DRIVER = Path(__file__).with_name("drive_schedules.py")
RANKS, MICRO_BATCHES = 4, 8
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(torchrun):
    return json.loads(torchrun(RANKS, DRIVER, MICRO_BATCHES).stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["1f1b", "zbv", "dualpipev"])
def test_bubble_and_live_activations_are_the_simulators(told, name):
    """1F1B and DualPipeV run in the simulator's own order. It has none for ZBV, so there what PyTorch executed is
    simulated, and only length, bubble and live activations of it are held."""
    ranks, seconds = told["ranks"][name], told["seconds"]
    done = [[Op(*op[:3]) for op in rank["ops"]] for rank in ranks]
    order = [[(op,) for op in ops] for ops in done]
    if name != "zbv":
        order = schedule(name, RANKS, MICRO_BATCHES)
        # PyTorch's DualPipeV runs the operations of a pair one after the other: nothing overlaps
        assert done == [[op for action in actions for op in action] for actions in order]
    timeline = execute(order, Durations(seconds["F"], seconds["B"], seconds["W"]))
    starts, ends = zip(*((start, end) for rank in ranks for *_, start, end in rank["ops"]), strict=True)
    length = max(ends) - min(starts)
    assert length == pytest.approx(timeline.seconds, rel=0.05)
    for rank, bubble in zip(ranks, timeline.bubble_seconds, strict=True):
        gaps = [after[3] - before[4] for before, after in pairwise(rank["ops"])]
        own = median(gaps) * len(gaps)  # most operations follow at once: PyTorch's own time between any two
        idle = length - sum(end - start for *_, start, end in rank["ops"]) - own
        assert idle == pytest.approx(bubble, rel=0.05)
    assert [rank["peak"] for rank in ranks] == timeline.peak_activations
    assert name != "dualpipev" or timeline.peak_activations[0] == 2 * RANKS + 1  # PP + 1, V3's table 2
