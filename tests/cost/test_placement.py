import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baleen.config import UserError
from baleen.cost.placement import place_experts

# The example in the README of github.com/deepseek-ai/EPLB: 16 replicas, 4 groups, 2 nodes, 8 GPUs.
LOAD = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
PLACED = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def test_worked_example():
    placement = place_experts(LOAD, 16, 4, 2, 8)
    assert placement.expert_of_slot.tolist() == PLACED
    assert placement.copies[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert placement.slots_of_expert[0, 5].tolist() == [0, 2]
    assert placement.slots_of_expert[0, 0].tolist() == [12, -1]


def test_heavier_copies_share_a_gpu_with_lighter_ones():
    """By hand: both copies go to expert 0, and 4, 8/3, 8/3, 8/3, 2, 2 fill three GPUs, the lightest first."""
    placement = place_experts([[8.0, 4.0, 2.0, 2.0]], 6, 1, 1, 3)
    assert placement.copies.tolist() == [[3, 1, 1, 1]]
    assert placement.gpu_load([[8.0, 4.0, 2.0, 2.0]], 3)[0].tolist() == pytest.approx([4 + 2, 8 / 3 + 8 / 3, 8 / 3 + 2])


@st.composite
def problems(draw):
    nodes = draw(st.sampled_from([1, 2, 4]))
    gpus = nodes * draw(st.sampled_from([1, 2, 4]))
    groups = draw(st.sampled_from([1, 2, 3, 4, 8]))
    experts = groups * gpus * draw(st.integers(1, 2))
    replicas = experts + gpus * draw(st.integers(0, 3))
    layers = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**16))
    load = np.random.default_rng(seed).pareto(1.5, (layers, experts)).round(3)
    return load, replicas, groups, nodes, gpus


@settings(deadline=None, max_examples=80)
@given(problems())
def test_every_expert_is_placed_and_no_load_is_lost(problem):
    load, replicas, groups, nodes, gpus = problem
    placement = place_experts(*problem)
    layers, experts = load.shape
    assert placement.expert_of_slot.shape == (layers, replicas)
    assert (placement.copies >= 1).all() and (placement.copies.sum(axis=1) == replicas).all()
    for layer in range(layers):
        for expert in range(experts):
            slots = placement.slots_of_expert[layer, expert]
            held = slots[slots >= 0]
            assert len(held) == placement.copies[layer, expert]
            assert (placement.expert_of_slot[layer, held] == expert).all()
    np.testing.assert_allclose(placement.gpu_load(load, gpus).sum(axis=1), load.sum(axis=1))


@settings(deadline=None, max_examples=80)
@given(problems())
def test_groups_stay_on_their_node_where_nodes_divide_them(problem):
    load, replicas, groups, nodes, gpus = problem
    if groups % nodes:
        return
    placement = place_experts(*problem)
    group_of_slot = placement.expert_of_slot // (load.shape[1] // groups)
    for per_node in group_of_slot.reshape(len(load), nodes, -1):
        assert [len(set(row)) for row in per_node.tolist()] == [groups // nodes] * nodes
        assert len({group for row in per_node.tolist() for group in set(row)}) == groups


def test_copies_go_where_the_load_is():
    """V3's prefill: 256 experts on 32 GPUs, 32 redundant. The busiest GPU must come close to the mean."""
    load = np.random.default_rng(0).lognormal(0.0, 0.6, (4, 256))
    plain = place_experts(load, 256, 8, 4, 32).gpu_load(load, 32)
    redundant = place_experts(load, 288, 8, 4, 32).gpu_load(load, 32)
    excess = [np.mean(gpus.max(axis=1) / gpus.mean(axis=1)) for gpus in (plain, redundant)]
    assert excess[1] < excess[0] < 1.35 and excess[1] < 1.12


def test_groups_that_nodes_do_not_divide_are_ignored():
    load = np.arange(1.0, 25.0)[None]
    assert np.array_equal(place_experts(load, 24, 3, 2, 4)[0], place_experts(load, 24, 1, 1, 4)[0])


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ((LOAD, 8, 4, 2, 8), "at least 12"),
        ((LOAD, 17, 4, 2, 8), "take 16 or 24 replicas"),
        ((LOAD, 16, 5, 2, 8), "12 experts do not divide over 5 groups"),
        ((LOAD, 18, 4, 2, 9), "take 8 or 10 GPUs"),
        ((LOAD, 16, 4, 0, 8), "at least 1"),
        ((LOAD[0], 16, 4, 2, 8), "one row per layer"),
        (([[-1.0] * 12], 16, 4, 2, 8), "negative"),
    ],
)
def test_bad_counts(arguments, fault):
    with pytest.raises(UserError, match=fault):
        place_experts(*arguments)
