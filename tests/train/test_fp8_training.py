"""The three FP8 matmuls against the same arithmetic in float64, and a model that trains in them."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from baleen.config import ModelConfig, UserError
from baleen.model.fp8 import WEIGHT_BLOCK, dequantize_blocks, quantize_blocks
from baleen.model.linear import grouped_linear_loop
from baleen.model.transformer import Transformer
from baleen.train import fp8
from baleen.train.fp8 import (
    AFTER_ATTENTION,
    COLUMN_TILE,
    EXPERT_DOWN,
    EXPERT_UP,
    PLAIN,
    ROW_TILE,
    FP8Experts,
    FP8Linear,
    fp8_grouped_linear,
    promoted_matmul,
    scaled_matmul,
    to_e5m6,
    use_fp8,
)
from baleen.train.layout import check_layout
from baleen.train.loop import train

SHAPES = [([130], 256, 128), ([5, 0, 131], 200, 70), ([0, 0], 128, 128), ([1], 1, 1)]  # rows a group, inputs, outputs


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(counts, inputs, outputs):
    x, w = random(sum(counts), inputs), random(len(counts), outputs, inputs, seed=1) * 0.02
    return x.requires_grad_(), w.requires_grad_(), random(sum(counts), outputs, seed=2)


def through(x, block, power_of_two=False):
    """Quantised and back, in float64."""
    return dequantize_blocks(*quantize_blocks(x, block, power_of_two=power_of_two), block).double()


def expected(x, w, g, counts, formats):
    """(y, gradient of x, gradient of w) of the paper's arithmetic, written down with dense float64 tensors."""
    x, w = x.detach(), w.detach()
    kept = to_e5m6(x).float() if formats.input_e5m6 else x
    x_rows = through(kept, ROW_TILE, formats.input_power_of_two)
    again = kept if formats.input_e5m6 else x_rows.float()
    w = through(w, WEIGHT_BLOCK)
    g_rows = through(g, ROW_TILE, formats.gradient_power_of_two)
    y, grad_x, grad_w = [], [], []
    for e, (x_e, g_e, again_e, plain_g) in enumerate(
        zip(x_rows.split(counts), g_rows.split(counts), again.split(counts), g.split(counts), strict=True)
    ):
        y.append(x_e @ w[e].t())
        grad_x.append(g_e @ w[e])
        g_columns = through(plain_g, COLUMN_TILE, formats.gradient_power_of_two)
        grad_w.append(g_columns.t() @ through(again_e, COLUMN_TILE, formats.input_power_of_two))
    return torch.cat(y), torch.cat(grad_x), torch.stack(grad_w)


@pytest.mark.parametrize("formats", [PLAIN, AFTER_ATTENTION, EXPERT_UP, EXPERT_DOWN])
@pytest.mark.parametrize(("counts", "inputs", "outputs"), SHAPES)
def test_three_products_are_those_of_the_tiles(counts, inputs, outputs, formats):
    x, w, g = operands(counts, inputs, outputs)
    y = fp8_grouped_linear(x, w, counts, formats)
    y.backward(g)
    for got, want in zip((y, x.grad, w.grad), expected(x, w, g, counts, formats), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_error_against_the_unquantised_is_that_of_three_bits_of_mantissa():
    """A number is off by up to 1/16, by 1/39 in the mean square (uniform over a binade), a product by sqrt 2 of it."""
    x, w, g = operands([256], 512, 256)
    fp8_grouped_linear(x, w, [256]).backward(g)
    grads = x.grad, w.grad
    x.grad = w.grad = None
    y = grouped_linear_loop(x, w, [256])
    y.backward(g)
    for got, want in zip((fp8_grouped_linear(x, w, [256]), *grads), (y, x.grad, w.grad), strict=True):
        relative = ((got - want).norm() / want.norm()).item()
        assert 0.025 < relative < 0.05


def test_an_outlier_costs_its_own_tile_only():
    x, w, _ = operands([4], 256, 128)
    with torch.no_grad():
        plain = fp8_grouped_linear(x, w, [4])
        x[2, 10] = 1e5
        spoilt = fp8_grouped_linear(x, w, [4])
    others = [0, 1, 3]
    assert torch.equal(plain[others], spoilt[others])
    second_half = fp8_grouped_linear(x[2:3, 128:].detach(), w[:, :, 128:].detach(), [1])
    first_half = fp8_grouped_linear(x[2:3, :128].detach(), w[:, :, :128].detach(), [1])
    torch.testing.assert_close(spoilt[2:3], first_half + second_half, rtol=1e-6, atol=0)


def test_zeros_stay_zeros_and_tiny_numbers_finite():
    x, w = torch.zeros(3, 130, requires_grad=True), torch.zeros(1, 5, 130, requires_grad=True)
    y = fp8_grouped_linear(x, w, [3])
    y.backward(torch.full_like(y, 1e-44))
    assert not y.any() and not x.grad.any() and not w.grad.any()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("formats", [PLAIN, AFTER_ATTENTION, EXPERT_UP, EXPERT_DOWN])
def test_what_is_not_finite_is_seen(bad, formats):
    x, w, g = operands([3], 130, 5)
    fp8_grouped_linear(x, w, [3], formats).backward(g.index_fill(0, torch.tensor(1), bad))
    assert not x.grad[1].isfinite().any() and not w.grad.isfinite().any() and x.grad[[0, 2]].isfinite().all()
    with torch.no_grad():
        x[1, 7] = bad
    y = fp8_grouped_linear(x, w, [3], formats)
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


def test_sums_are_promoted_every_128_products():
    """Where a first block's sum swallows a second's in one FP32 chain, apart they both count."""
    a = torch.ones(1, 256)
    one = torch.ones(1, 2)
    b_scale = torch.tensor([[2.0**20, 1.0]])
    got = promoted_matmul(a, one, a, b_scale)
    assert got.item() == 128 * 2.0**20 + 128


def test_e5m6_rounds_to_six_bits():
    """One tile whose scale is 1: its largest magnitude is in (E5M6_MAX / 2, E5M6_MAX]."""
    x = torch.zeros(1, 128)
    values = [65024.0, 1 + 1 / 64, 1 + 1 / 128, 1 + 3 / 128, -(1 + 1 / 100), 2**-14, 2**-20, 2**-21, 1.5 * 2**-20]
    rounded = [65024.0, 1 + 1 / 64, 1.0, 1 + 2 / 64, -(1 + 1 / 64), 2**-14, 2**-20, 0.0, 2**-19]
    x[0, : len(values)] = torch.tensor(values)
    assert to_e5m6(x)[0, : len(values)].tolist() == rounded


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**-9, 1.0, 2.0**40])
def test_e5m6_scales_are_powers_of_two(factor):
    """Numbers times a power of two round alike; twice is once; the error is below half a step."""
    x = random(7, 200)
    once = to_e5m6(x)
    assert torch.equal(to_e5m6(x * factor).float(), once.float() * factor)
    assert torch.equal(to_e5m6(once), once)
    assert ((once.float() - x).abs() <= x.abs() / 128).all()
    assert ((once.float() - x).abs() > x.abs() / 300).any()


def test_what_is_quantised(tiny_recipe):
    config = tiny_recipe(model={"q_lora_rank": 8}).model
    model = Transformer(config)
    names = set(model.state_dict())
    use_fp8(model)
    assert set(model.state_dict()) == names
    wide = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not isinstance(m, FP8Linear)}
    assert wide == {"lm_head", "model.layers.2.eh_proj"}
    layer = model.model.layers[1]
    assert isinstance(layer.mlp.experts, FP8Experts) and layer.self_attn.o_proj.formats == AFTER_ATTENTION
    assert layer.self_attn.q_a_proj.formats == layer.mlp.shared_experts.up_proj.formats == PLAIN


def test_without_gradients_the_model_is_as_before():
    config = ModelConfig.model_validate(
        {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8}
        | {"num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": 0, "kv_lora_rank": 8, "v_head_dim": 8}
        | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "initializer_range": 0.2}
    )
    model, ids = Transformer(config), torch.arange(12)[None]
    model.init_weights(0)
    with torch.no_grad():
        before = model(ids).hidden_BTd
    use_fp8(model)
    with torch.no_grad():
        assert torch.equal(model(ids).hidden_BTd, before)
    trained = model(ids).hidden_BTd
    assert 1e-3 < ((trained - before).norm() / before.norm()).item() < 0.3


def test_bias_and_leading_dimensions():
    layer = torch.nn.Linear(24, 8)
    want = F.linear(through(random(6, 24), ROW_TILE), through(layer.weight.detach(), WEIGHT_BLOCK)) + layer.bias
    layer.__class__ = FP8Linear
    layer.formats = PLAIN
    got = layer(random(6, 24).view(2, 3, 24))
    assert got.shape == (2, 3, 8)
    torch.testing.assert_close(got.view(6, 8).double(), want, rtol=1e-5, atol=1e-6)


def test_a_run_in_fp8_learns_as_one_in_fp32(tiny_recipe, tmp_path):
    plain = train(tiny_recipe(), tmp_path / "fp32")
    fp8 = train(tiny_recipe(train={"precision": "fp8"}), tmp_path / "fp8")
    assert fp8["weights_sha256"] != plain["weights_sha256"]
    assert abs(fp8["loss"] / plain["loss"] - 1) < 0.01


def test_several_processes_are_refused(tiny_recipe):
    with pytest.raises(UserError, match="one process"):
        check_layout(tiny_recipe(train={"precision": "fp8"}), 2)


def by_tensor_cores(a_MK, b_KN, a_scale, a_recipe, b_scale, b_recipe, *, output_dtype, use_fast_accum):
    """What `F.scaled_mm` is said to compute of tiles, in float64; its sizes and strides are asserted."""
    assert a_recipe == b_recipe == F.ScalingType.BlockWise1x128 and not use_fast_accum
    (M, K), N = a_MK.shape, b_KN.shape[1]
    assert a_MK.stride() == (K, 1) and b_KN.stride() == (1, K) and (M % 16, N % 16, K % 128) == (0, 0, 0)
    for scale, rows in ((a_scale, M), (b_scale, N)):
        assert scale.shape == (rows, K // 128) and scale.stride() == (1, rows)
    a, b = (
        x.double() * scale.double().repeat_interleave(128, 1) for x, scale in ((a_MK, a_scale), (b_KN.t(), b_scale))
    )
    return (a @ b.t()).to(output_dtype)


@pytest.mark.parametrize(("counts", "inputs", "outputs"), SHAPES)
def test_tensor_cores_are_asked_for_the_same(counts, inputs, outputs, monkeypatch):
    x, w, g = operands(counts, inputs, outputs)
    results = []
    for there in (False, True):
        monkeypatch.setattr(fp8, "multiplies_fp8_tiles", lambda _, there=there: there)
        monkeypatch.setattr(F, "scaled_mm", by_tensor_cores if there else None)
        y = fp8_grouped_linear(x, w, counts)
        results.append((y, *torch.autograd.grad(y, (x, w), g)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_torch_takes_what_it_is_given_on_a_gpu():
    """By its own checks of sizes, strides and types, on a GPU that is not there."""
    with FakeTensorMode():
        a, b = (torch.empty(rows, 200, device="cuda").to(torch.float8_e4m3fn) for rows in (5, 70))
        scales = (torch.empty(len(x), 2, device="cuda") for x in (a, b))
        out = scaled_matmul(a, next(scales), b, next(scales))
    assert out.shape == (5, 70) and out.dtype == torch.float32 and out.device.type == "cuda"
