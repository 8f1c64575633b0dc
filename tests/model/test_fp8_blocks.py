"""Block formats of FP8: error bounds, scales, shapes and special cases."""

import math

import pytest
import torch

from baleen.model.fp8 import E4M3, WEIGHT_BLOCK, dequantize_blocks, quantize_blocks, scale_shape


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 70), (1, 1), (3, 200, 129)])
@pytest.mark.parametrize("block", [WEIGHT_BLOCK, (1, 128), (128, 1)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_error_is_half_a_step_of_its_block(shape, block, power_of_two):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10
    quantized, scale = quantize_blocks(x, block, power_of_two=power_of_two)
    assert quantized.shape == x.shape and quantized.dtype == E4M3
    assert scale.shape == scale_shape(shape, block) and scale.dtype == torch.float32
    back = dequantize_blocks(quantized, scale, block)
    full = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., : shape[-2], : shape[-1]]
    # Three bits of mantissa: half a step is 1/16 of the value, or 2^-10 scales among the subnormals.
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16, full * 2**-10) * 1.0001).all()
    assert torch.equal(back, quantized.float() * full)


def test_scales_use_the_whole_range():
    x = torch.zeros(128, 256)
    x[3, 5], x[7, 200] = 896.0, -2.0
    quantized, scale = quantize_blocks(x, WEIGHT_BLOCK)
    assert torch.equal(scale, torch.tensor([[2.0, 2 / 448]]))
    assert quantized[3, 5].item() == 448 and quantized[7, 200].item() == -448


def test_powers_of_two_are_rounded_up_and_fit_ue8m0():
    x = torch.tensor([[448.0, 449.0, 448.0 * 0.25, 1e-30, 0.0]])
    _, scale = quantize_blocks(x, (1, 1), power_of_two=True)
    assert scale.tolist()[0][:3] == [1.0, 2.0, 0.25] and scale[0, 4] == 1.0
    assert torch.equal(scale.to(torch.float8_e8m0fnu).float(), scale)
    quantized, _ = quantize_blocks(x, (1, 1), power_of_two=True)
    stored = dequantize_blocks(quantized, scale.to(torch.float8_e8m0fnu), (1, 1))
    assert torch.equal(stored, dequantize_blocks(quantized, scale, (1, 1)))


def test_quantising_again_changes_nothing():
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    once = dequantize_blocks(*quantize_blocks(x, WEIGHT_BLOCK, power_of_two=True), WEIGHT_BLOCK)
    twice = dequantize_blocks(*quantize_blocks(once, WEIGHT_BLOCK, power_of_two=True), WEIGHT_BLOCK)
    assert torch.equal(once, twice)


def test_blocks_too_small_to_divide_by_are_zeros():
    quantized, scale = quantize_blocks(torch.full((2, 3), 1e-44), (1, 128))
    assert not quantized.float().isnan().any() and (scale > 0).all()


@pytest.mark.parametrize("block", [WEIGHT_BLOCK, (1, 128), (128, 1)])
def test_no_rows_have_no_scales(block):
    quantized, scale = quantize_blocks(torch.empty(0, 200), block)
    assert quantized.shape == (0, 200) and scale.shape == scale_shape((0, 200), block)
    assert dequantize_blocks(quantized, scale, block).shape == (0, 200)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_is_not_finite_stays_so(bad, power_of_two):
    x = torch.tensor([[bad, 1e4, 1.0]])
    assert not dequantize_blocks(*quantize_blocks(x, (1, 128), power_of_two=power_of_two), (1, 128)).isfinite().any()
