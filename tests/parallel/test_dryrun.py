"""What fake ranks hold and send, against counts by hand and the cost engine's formula."""

import json

import drive_traffic
import pytest
import torch

from baleen.config import ModelConfig, UserError
from baleen.cost.architecture import from_model_config
from baleen.cost.layout import Layout
from baleen.cost.traffic import expert_all_to_all
from baleen.parallel.dryrun import Traffic, _fake_group, dry_run
from baleen.parallel.mesh import Mesh, make_grid
from baleen.parallel.team import take_part
from baleen.parallel.worker import MicroBatch
from baleen.recipe import ParallelConfig
from baleen.train.loss import Objective

pytestmark = pytest.mark.slow
OBJECTIVE = Objective(0.3, 1e-4, "fp32")
B, T = 2, 16


def test_bytes_of_all_to_all_equal_the_cost_engines_exactly(tiny_config):
    config = tiny_config(num_hidden_layers=5)
    found = dry_run(
        config, ParallelConfig(pipeline=2, expert=2, schedule="dualpipev"), OBJECTIVE, world=8, sequences=B, seq_len=T
    )
    assert found["grid"] == {"pipeline": 2, "replicate": 1, "share": 2, "expert": 2}
    layout = Layout(devices=8, pipeline=2, expert=2)
    a_token = expert_all_to_all(from_model_config(config), layout, 1, "fp32").network
    # the first rank folds back to the last stage, whose MTP layer sees one position less; the second has four layers
    for rank, tokens in zip(found["ranks"], (B * (T - 1), 4 * B * T), strict=True):
        leaving = rank["traffic"]["alltoall_base"] / 2  # of two ranks, half of what is handed over stays
        assert leaving == 2 * a_token * tokens  # forward and backward


def test_bytes_of_fp8_dispatch_equal_the_cost_engines_exactly(tiny_config):
    config, parallel = tiny_config(hidden_size=256), ParallelConfig(expert=2, dispatch="fp8")
    (rank,) = dry_run(config, parallel, OBJECTIVE, world=2, sequences=B, seq_len=T)["ranks"]
    a_token = expert_all_to_all(from_model_config(config), Layout(devices=2, expert=2), 1, "fp8").network
    assert rank["traffic"]["alltoall_base"] / 2 == 2 * a_token * (2 * B * T + B * (T - 1))


def test_bytes_of_a_real_step_equal_the_cost_engines_and_the_counts_before_them(torchrun):
    """Two processes over gloo. Beside its tokens, a rank tells the other how many come for each of its experts: int64,
    once for each MoE layer and forward, which the cost engine does not count."""
    config, told = ModelConfig(**drive_traffic.MODEL), {}
    layers_times_tokens = drive_traffic.B * (2 * drive_traffic.T + drive_traffic.T - 1)  # two layers, and MTP's
    for dispatch, precision in (("wide", "fp32"), ("fp8", "fp8")):
        told[dispatch] = json.loads(torchrun(2, drive_traffic.__file__, dispatch).stdout.splitlines()[-1])
        a_token = expert_all_to_all(from_model_config(config), Layout(devices=2, expert=2), 1, precision).network
        counts = 3 * 8 * config.n_routed_experts / 2
        assert told[dispatch]["leaving"] == 2 * (2 * a_token * layers_times_tokens + counts)  # forward and backward
    assert told["fp8"]["loss"] != told["wide"]["loss"]
    assert told["fp8"]["loss"] == pytest.approx(told["wide"]["loss"], rel=0.01)


def test_zero_1_holds_a_share_of_the_weights_and_reduces_once(tiny_config):
    whole, *_ = dry_run(tiny_config(), ParallelConfig(zero=0), OBJECTIVE, world=4, sequences=B, seq_len=T)["ranks"]
    shard, *_ = dry_run(tiny_config(), ParallelConfig(zero=1), OBJECTIVE, world=4, sequences=B, seq_len=T)["ranks"]
    assert shard["weights"] == pytest.approx(whole["weights"] / 4, rel=0.01)
    assert shard["optimizer"] == 2 * shard["weights"] and shard["gradients"] == shard["weights"]
    assert shard["traffic"]["reduce_scatter_base"] == pytest.approx(whole["weights"], rel=0.01)
    assert shard["traffic"]["allgather_base"] == shard["weights"]  # gathered once: not again for the backward


@pytest.mark.parametrize(("zero", "reduced", "gathered"), [(0, 1, 0), (1, 1, 1), (2, 3, 1)])
def test_what_a_step_of_three_micro_batches_sends(tiny_model, zero, reduced, gathered):
    """In multiples of the weights: ZeRO-1 reduces once a step, and gathers once, for all forwards and backwards."""
    model, parallel = tiny_model(), ParallelConfig(zero=zero)
    weights = 4 * sum(p.numel() for p in model.parameters())
    micro_batch = MicroBatch(torch.randint(97, (B, T + 1)), None, None, torch.full((3,), 1 / 3))
    with _fake_group(0, 4), Traffic() as traffic:
        team = take_part(model, parallel, Mesh(make_grid(parallel, model.config, 4), "cpu"))
        team.accumulate(3 * [micro_batch], OBJECTIVE)
        held = 4 * sum(p.numel() for p in team.parameters.values())
    sent = traffic.bytes
    assert held == pytest.approx(weights / (4 if zero else 1), rel=0.01)
    kind = "reduce_scatter_base" if zero else "allreduce"
    assert sent[kind] == pytest.approx(reduced * weights, rel=0.01)
    assert sent["allgather_base"] == gathered * held


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_a_pipeline_reduces_once_and_has_a_buffer_for_each_micro_batch(torchrun, schedule):
    """Of four processes, two and two a pipeline, in a step of four micro-batches: ZeRO-1 reduces what a rank has of the
    weights once, and gathers it once. PyTorch's receive buffers are as the dry run has them."""
    told = json.loads(torchrun(4, drive_traffic.__file__, schedule).stdout.splitlines()[-1])["ranks"]
    config, micro_batches = ModelConfig(**drive_traffic.MODEL), drive_traffic.MICRO_BATCHES
    parallel = ParallelConfig(pipeline=2, zero=1, schedule=schedule)
    sequences = drive_traffic.B // micro_batches
    counted = dry_run(config, parallel, OBJECTIVE, world=4, sequences=sequences, seq_len=drive_traffic.T)["ranks"]
    for number, rank in enumerate(told):
        assert rank["sent"]["reduce_scatter_base"] == pytest.approx(rank["whole"], rel=0.02)  # with padding
        assert rank["sent"]["allgather_base"] == pytest.approx(rank["held"], rel=0.02)
        expected = counted[number // 2]
        assert rank["buffers"] == micro_batches * (expected["inputs"] + expected["returned"]) > 0
        assert rank["sent"]["send"] == rank["sent"]["recv"] > 0


def test_what_is_recomputed_is_not_kept(tiny_config):
    def kept(*kinds):
        parallel = ParallelConfig(recompute=kinds)
        return dry_run(tiny_config(), parallel, OBJECTIVE, world=4, sequences=B, seq_len=T)["ranks"][0]["kept"]

    # outputs of SwiGLU: 48 in the dense layer, 16 in each of 3 routed experts and a shared one of two layers and of MTP
    assert kept() - kept("swiglu") == 4 * (B * T * 48 + (2 * B * T + B * (T - 1)) * 4 * 16)


def test_an_impossible_layout_fails(tiny_config):
    with pytest.raises(UserError, match="the nearest that does is parallel.* = 2"):
        dry_run(tiny_config(), ParallelConfig(expert=3), OBJECTIVE, world=4, sequences=B, seq_len=T)
