"""What divides and what does not; which layers a stage gets; which nodes a token reaches. No processes."""

import pytest
import torch

from baleen.config import ModelConfig, UserError
from baleen.model.moe import Gate
from baleen.parallel.expert import nodes_reached
from baleen.parallel.mesh import Grid, make_grid
from baleen.parallel.stage import attach_loss, split_layers
from baleen.recipe import ParallelConfig

V3 = ModelConfig()


def test_v3_on_2048_ranks():
    grid = make_grid(ParallelConfig(pipeline=16, expert=64), V3, 2048)
    assert grid == Grid(pipeline=16, replicate=1, share=2, expert=64)
    assert (grid.world, grid.data, grid.replicas) == (2048, 128, 2)


@pytest.mark.parametrize(
    ("keys", "world", "says"),
    [
        (
            {"pipeline": 3},
            8,
            "8 processes do not divide by parallel.pipeline = 3: the nearest that does is parallel.pipeline = 2",
        ),
        ({"shard": 3}, 8, "parallel.shard = 3: the nearest that does is parallel.shard = 2"),
        (
            {"expert": 3},
            6,
            "256 routed experts do not divide by parallel.expert = 3: the nearest that does is parallel.expert = 2",
        ),
        ({"shard": 4, "expert": 8}, 8, "4 ranks that share one copy of the weights do not divide"),
        ({"world": 16}, 8, "made for 16 processes and 8 were started"),
        # of 6 processes and 256 experts: 3 would divide the first and not the second
        ({"expert": 4}, 6, "6 ranks that share one copy .* the nearest that does is parallel.expert = 2"),
        ({"pipeline": 2, "zero": 2}, 8, "take parallel.zero=1, as V3 does, or 0"),
        ({"zero": 0, "shard": 2}, 8, "leave it out of zero 0"),
    ],
)
def test_what_does_not_divide_is_told_with_the_nearest_that_does(keys, world, says):
    with pytest.raises(UserError, match=says):
        make_grid(ParallelConfig(**keys), V3, world)


@pytest.mark.parametrize("stages", [1, 2, 4, 16, 32])
def test_stages_hold_every_layer_once_and_the_last_fewer(stages):
    cut = split_layers(V3, stages)
    assert [layer for part in cut for layer in part] == list(range(61))
    assert max(map(len, cut)) - min(map(len, cut[:-1] or cut)) <= 1
    assert stages == 1 or len(cut[-1]) == max(0, (61 + 2) // stages - 2)


def test_more_stages_than_layers(tiny_config):
    with pytest.raises(UserError, match="take at most 4 stages"):
        split_layers(tiny_config(), 8)


def test_group_limited_routing_reaches_no_more_nodes_than_groups():
    config = ModelConfig(hidden_size=16, n_routed_experts=64, n_group=8, topk_group=4, num_experts_per_tok=8)
    gate, generator = Gate(config), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(gate.weight, generator=generator)
    node_E = torch.arange(64) // 8
    reached = nodes_reached(gate(torch.randn(500, 16, generator=generator)), node_E)
    assert reached.shape == (500,) and reached.max() == 4 and reached.min() >= 1
    free = Gate(config.model_copy(update={"n_group": 1, "topk_group": 1}))
    free.weight.data.copy_(gate.weight)
    assert nodes_reached(free(torch.randn(500, 16, generator=generator)), node_E).max() > 4


def test_an_attached_loss_gets_its_gradient_and_changes_nothing():
    x, w = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    out = attach_loss(x, 5 * w)
    out.backward(torch.full((3,), 7.0))
    assert out.tolist() == [1, 1, 1] and x.grad.tolist() == [7, 7, 7] and w.grad.item() == 5
