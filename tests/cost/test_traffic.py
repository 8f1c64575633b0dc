"""Bytes on links against counts made by drawing experts, and against V3's published traffic."""

import numpy as np
import pytest

from baleen.config import ModelConfig
from baleen.cost.architecture import from_model_config
from baleen.cost.layout import Layout
from baleen.cost.memory import StageParameters
from baleen.cost.traffic import (
    context_bytes,
    data_bytes,
    expected_places,
    expert_all_to_all,
    pipeline_bytes,
    tensor_bytes,
)

V3 = from_model_config(ModelConfig())
EP64 = Layout(devices=2048, pipeline=16, expert=64, zero=1)


def test_expected_places_equal_the_mean_of_draws():
    rng = np.random.default_rng(0)
    drawn = [len(set(rng.permutation(256)[:8] // 32)) for _ in range(4000)]
    assert expected_places(8, 8, 256) == pytest.approx(np.mean(drawn), rel=0.01)
    assert expected_places(8, 8, 256, limit=4) == 4
    assert expected_places(1, 8, 256) == 1


def test_v3_sends_a_token_to_four_nodes_at_most():
    limited = expert_all_to_all(V3, EP64, domain=8, precision="fp8", node_limit=4)
    ordinary = expert_all_to_all(V3, EP64, domain=8, precision="fp8")
    dispatch_and_combine = 7168 * (1 + 4 / 128 + 2)
    assert limited.network == pytest.approx(4 * 7 / 8 * dispatch_and_combine)
    assert ordinary.network == pytest.approx(8 * 7 / 8 * dispatch_and_combine)  # a copy for each of 8 experts


def test_no_parallelism_no_traffic():
    alone = Layout(devices=1)
    assert expert_all_to_all(V3, alone, 8, "bf16") == (0, 0)
    assert tensor_bytes(V3, alone) == pipeline_bytes(V3, alone) == 0
    assert data_bytes(StageParameters(1e9, 0), Layout(devices=1, zero=0), "bf16", 1) == (0, 0)


def test_data_parallel_bytes_by_sharding():
    held = StageParameters(1e9, 0)
    sent = [data_bytes(held, Layout(devices=8, zero=z), "bf16", 1).shared for z in (0, 1, 3)]
    assert sent[0] == pytest.approx(2 * 7 / 8 * 4e9)  # all-reduce of FP32 gradients
    assert sent[1] == pytest.approx(7 / 8 * (4e9 + 2e9))  # scatter gradients, gather weights
    assert sent[2] == pytest.approx(7 / 8 * (2 * 2e9 + 4e9))  # gather twice, scatter once


def test_the_two_copies_of_dualpipe_are_kept_alike_too():
    held = StageParameters(1e9, 1e9)
    one, two = (
        data_bytes(held, Layout(devices=64, pipeline=4, expert=8, schedule=name), "bf16", 8)
        for name in ("1f1b", "dualpipe")
    )
    assert one.shared == pytest.approx(15 / 16 * 6e9) and two.shared == pytest.approx(2 * 31 / 32 * 6e9)
    assert one.experts == pytest.approx(1 / 2 * 6e9) and two.experts == pytest.approx(2 * 3 / 4 * 6e9)


def test_keys_and_values_go_once_round_the_ring():
    """The first copy leaves with its owner, each further one with who has just read it: n - 1 in all."""
    copy = V3.num_attention_heads * (V3.qk_head_dim + V3.v_head_dim) * 2
    assert context_bytes(V3, Layout(devices=2, context=2)) == copy
    assert context_bytes(V3, Layout(devices=16, context=8, tensor=2)) == 7 * copy / 2
