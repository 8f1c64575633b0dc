"""Tokens that travel in FP8, over a group of one rank: what is sent, and the error it adds."""

import pytest
import torch
import torch.distributed as dist

from baleen.config import ModelConfig
from baleen.model.fp8 import dequantize_blocks, quantize_blocks
from baleen.model.moe import DeepseekMoE
from baleen.parallel.expert import ACTIVATION_BLOCK, ExpertParallel, Trip, exchange, send_bf16, send_fp8

WIDTHS = {"hidden_size": 256, "moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 3}


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def in_fp8(x):
    numbers, scales = quantize_blocks(x, ACTIVATION_BLOCK, power_of_two=True)
    assert scales.log2().frac().eq(0).all()
    return dequantize_blocks(numbers, scales, ACTIVATION_BLOCK)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_rows_go_in_tiles_of_fp8_and_their_gradients_return_in_bf16(group):
    x, grad = torch.randn(2, 6, 256).unbind()
    x.requires_grad_()
    rows = exchange(x, Trip([6], [6], group), send_fp8, send_bf16)
    rows.backward(grad)
    assert rows.equal(in_fp8(x.detach())) and x.grad.equal(grad.bfloat16().float())


def test_the_error_that_fp8_dispatch_adds(group):
    torch.manual_seed(0)
    moe = DeepseekMoE(ModelConfig(**WIDTHS, n_group=1, topk_group=1, n_shared_experts=0))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x_Nd, grad_Nd = torch.randn(2, 512, 256).unbind()
    routing = moe.gate(x_Nd)

    def passed(dispatch, x):
        x = x.clone().requires_grad_()
        moe.zero_grad()
        y = dispatch(x, moe.gate(x_Nd), moe.experts)
        y.backward(grad_Nd)
        return y.detach(), x.grad, moe.experts.down_proj.grad

    wide, fp8 = ExpertParallel(group), ExpertParallel(group, fp8=True)
    exact, dispatched = passed(wide, x_Nd), passed(fp8, x_Nd)
    # E4M3 has 3 bits behind the point: a number is off by 1/16 at most, by 2.6 % in the mean of squares. SwiGLU
    # multiplies two such; gradients of the weights are products of what left forward and what left backward
    errors = [relative(told, true) for told, true in zip(dispatched, exact, strict=True)]
    print("relative errors of outputs, gradients of inputs and of weights:", errors)
    assert all(0.02 < error < 0.05 for error in errors)
    # nearly all of it is that of the numbers that left: computed from those, only BF16's part is there
    assert relative(dispatched[0], passed(wide, in_fp8(x_Nd))[0]) < 0.003
    assert routing.load().sum() == 512 * 3
