"""The native kernels of a training step against their PyTorch twins, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from needs import needs_native
from torch import Tensor
from torch.func import functional_call

from baleen.model import linear, rows, sdpa
from baleen.model.fused import (
    IGNORED,
    cross_entropy_,
    cross_entropy_twin_,
    rms_norm,
    rms_norm_twin,
    swiglu,
    swiglu_twin,
)
from baleen.model.linear import Linear, grouped_linear, grouped_linear_loop, products, row_alignment, weight_gradients
from baleen.model.native.training import multiplies
from baleen.model.rows import combine_rows, sum_rows_twin
from baleen.model.sdpa import Attention

FP32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {FP32: 2e-6, BF16: 1e-2}  # of the largest value

NATIVE = [FP32, *([BF16] if multiplies(BF16) else [])]  # what is multiplied natively here
multiplied = pytest.mark.parametrize("dtype", NATIVE)


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype, times: float = 1.0) -> bool:
    assert ours.dtype is theirs.dtype and ours.shape == theirs.shape
    difference = (ours.double() - theirs.double()).abs().max()
    return bool(difference <= times * TOLERANCE[dtype] * theirs.double().abs().max())


def gradients(function, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    seed = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=seed).to(out.dtype))
    grads = [leaf.grad for leaf in leaves]
    assert all(grad is not None for grad in grads)
    return out.detach(), grads  # type: ignore[return-value]


@needs_native
@pytest.mark.parametrize(("dtype", "to"), [(FP32, FP32), (FP32, BF16), (BF16, BF16)])
@pytest.mark.parametrize("shape", [(7, 33), (3, 5, 128), (1, 16)])
def test_rms_norm(dtype: torch.dtype, to: torch.dtype, shape: tuple[int, ...]):
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(shape)).to(dtype), torch.rand(shape[-1]) + 0.5
    ours, our_grads = gradients(lambda x, w: rms_norm(x, w, 1e-6, to), [x, weight])
    theirs, their_grads = gradients(lambda x, w: rms_norm_twin(x.float(), w, 1e-6, to), [x, weight])
    assert close(ours, theirs, to)
    assert all(close(a, b, to) for a, b in zip(our_grads, their_grads, strict=True))


@needs_native
def test_no_number_stays_none_when_it_is_rounded():
    """All bits set, as in a torn file, would become -0 with the carry of rounding."""
    x = torch.full((2, 16), -1, dtype=torch.int32).view(FP32)
    assert rms_norm(x, torch.ones(16), 1e-6, BF16).isnan().all()


@needs_native
def test_rms_norm_of_a_slice():
    torch.manual_seed(0)
    whole, weight = torch.randn(4, 6, 40), torch.rand(24)
    ours, our_grads = gradients(lambda x, w: rms_norm(x[..., :24], w, 1e-6, FP32), [whole, weight])
    theirs, their_grads = gradients(lambda x, w: rms_norm_twin(x[..., :24], w, 1e-6, FP32), [whole, weight])
    assert close(ours, theirs, FP32)
    assert all(close(a, b, FP32) for a, b in zip(our_grads, their_grads, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("joined", [True, False])
def test_swiglu(dtype: torch.dtype, joined: bool):
    torch.manual_seed(0)
    parts = [(4 * torch.randn(3, 11, 40)).to(dtype)] if joined else [torch.randn(9, 17).to(dtype) for _ in range(2)]
    parts[0].view(-1)[:2] = torch.tensor([200.0, -200.0])  # where exp overflows or vanishes
    ours, our_grads = gradients(swiglu, parts)
    theirs, their_grads = gradients(swiglu_twin, [part.float() for part in parts])
    assert close(ours, theirs.to(dtype), dtype)
    assert all(close(a, b.to(dtype), dtype) for a, b in zip(our_grads, their_grads, strict=True))


@pytest.mark.parametrize("joined", [True, False])
def test_swiglu_in_float64_is_the_twin_and_keeps_its_input_alone(joined: bool):
    parts = [torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(1 if joined else 2)]
    assert torch.autograd.gradcheck(swiglu, parts)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        swiglu(*parts)
    assert kept == [part.data_ptr() for part in parts]


@needs_native
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_cross_entropy(dtype: torch.dtype):
    torch.manual_seed(0)
    logits, targets = (5 * torch.randn(21, 131)).to(dtype), torch.randint(131, (21,))
    targets[[3, 20]] = IGNORED
    ours, theirs = logits.clone(), logits.float()
    loss = cross_entropy_(ours, targets, 0.25, True)
    assert torch.isclose(loss, cross_entropy_twin_(theirs, targets, 0.25, True), rtol=1e-6)
    assert close(ours, theirs.to(dtype), dtype)
    assert not ours[3].any()
    unread = logits.clone()
    cross_entropy_(unread, targets, 0.25, False)
    assert torch.equal(unread, logits)


@pytest.mark.parametrize("target", [7, -1])
def test_a_target_outside_the_vocabulary_is_refused(target: int):
    logits, targets = torch.randn(2, 7), torch.tensor([0, target])
    for loss in (cross_entropy_, cross_entropy_twin_):
        with pytest.raises(IndexError, match=r"vocabulary|out of bounds"):
            loss(logits.clone(), targets, 1.0, True)


def test_the_twin_is_the_gradient():
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 9, dtype=torch.float64, requires_grad=True), torch.tensor([1, 2, IGNORED, 0, 8])
    F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").backward()
    overwritten = logits.detach().clone()
    cross_entropy_twin_(overwritten, targets, 1.0, True)
    assert logits.grad is not None and torch.allclose(overwritten, logits.grad, atol=1e-12)


@needs_native
def test_the_native_kernels_are_the_ones_that_run(monkeypatch: pytest.MonkeyPatch):
    import baleen.model.fused as fused

    called = []
    for module in (fused, linear):
        monkeypatch.setattr(module, "call", lambda name, *_: called.append(name))
    x = torch.ones(2, 4)
    rms_norm(x, torch.ones(4), 1e-6, FP32)
    swiglu(x, x)
    cross_entropy_(x, torch.zeros(2, dtype=torch.long), 1.0, True)
    Linear(4, 3)(x)
    rms_norm(x.double(), torch.ones(4), 1e-6, torch.float64)  # the twin's
    Linear(4, 3, dtype=torch.float64)(x.double())
    assert called == ["rms_norm", "swiglu", "cross_entropy", "linear"]


@needs_native
def test_equal_runs_are_equal_bit_for_bit():
    torch.manual_seed(0)
    x, weight = torch.randn(100, 64), torch.rand(64)
    runs = [gradients(lambda x, w: rms_norm(x, w, 1e-6, FP32), [x, weight])[1] for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@needs_native
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("d", [24, 300])
def test_combine_rows(dtype: torch.dtype, d: int):
    torch.manual_seed(0)
    y, weights = torch.randn(29, d).to(dtype), torch.rand(8, 3)
    slots = torch.randperm(29)[:24].view(8, 3)  # five rows stand nowhere
    ours, our_grads = gradients(lambda y, w: combine_rows(y, slots, w), [y, weights])
    theirs, their_grads = gradients(lambda y, w: sum_rows_twin(y, slots, w), [y.float(), weights])
    assert close(ours, theirs.to(dtype), dtype)
    assert close(our_grads[0], their_grads[0].to(dtype), dtype) and close(our_grads[1], their_grads[1], dtype)


def test_gradients_of_gates_are_summed_in_fp32_without_kernels(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    monkeypatch.setattr(rows, "serves", lambda *_: False)
    y, weights, slots = torch.randn(24, 300).bfloat16(), torch.rand(8, 3), torch.randperm(24).view(8, 3)
    _, (_, ours) = gradients(lambda y, w: combine_rows(y, slots, w), [y, weights])
    _, (_, exact) = gradients(lambda y, w: sum_rows_twin(y, slots, w).bfloat16(), [y.double(), weights.double()])
    assert (ours - exact).abs().max() <= exact.abs().max() / 128  # the one rounding of the result


def test_combine_rows_passes_gradcheck():
    y, weights = torch.randn(9, 4, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    slots = torch.tensor([[8, 0], [3, 5], [1, 2]])
    inputs = (y.requires_grad_(), weights.requires_grad_())
    assert torch.autograd.gradcheck(lambda y, w: combine_rows(y, slots, w), inputs)


@needs_native
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("tokens", [1, 2, 7, 24, 25, 32, 33, 64, 131, 2500])
@pytest.mark.parametrize("widths", [(20, 6, 12), (32, 16, 32)])
def test_causal_attention(dtype: torch.dtype, tokens: int, widths: tuple[int, int, int]):
    """Of tokens on either side of a block, and of widths that are and are not whole vectors."""
    torch.manual_seed(0)
    B, H, N, P, V = ((2, 3) if tokens < 1000 else (1, 1)) + widths
    queries, turned = torch.randn(B, tokens, H, N + P).to(dtype), torch.randn(B, tokens, H, P)
    kv, k_rope = torch.randn(B, tokens, H, N + V).to(dtype), torch.randn(B, tokens, P)
    inputs = [queries, turned, kv, k_rope]

    attend = Attention(0.3)

    def ours(q, q_rope, kv, k_rope):
        return attend(q[..., :N], q_rope, kv, k_rope, None)

    def theirs(q, q_rope, kv, k_rope):
        return attend.twin(q[..., :N], q_rope, kv, k_rope, None)

    out, grads = gradients(ours, inputs)
    expected, expected_grads = gradients(theirs, [x.double() for x in inputs])
    long = 1 + tokens / 500  # sums of so many terms
    assert close(out, expected.to(dtype), dtype, long)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        nothing = tokens == 1 and wanted.abs().max() < 1e-12  # a lone token attends to itself whatever it asks
        assert grad.abs().max() < 1e-5 if nothing else close(grad, wanted.to(grad.dtype), dtype, long)


@needs_native
def test_attention_is_pytorchs_beyond_the_longest_and_under_a_mask(monkeypatch: pytest.MonkeyPatch):
    called, run = [], sdpa.call
    monkeypatch.setattr(sdpa, "call", lambda name, *rest: (called.append(name), run(name, *rest)))
    monkeypatch.setattr(sdpa, "LONGEST", 64)
    for tokens, mask, native in ((64, None, True), (65, None, False), (8, torch.ones(1, 1, 8, 8).tril() > 0, False)):
        parts = torch.randn(1, tokens, 2, 4), torch.randn(1, tokens, 2, 2), torch.randn(1, tokens, 2, 7)
        Attention(0.3)(*parts, torch.randn(1, tokens, 2), mask)
        assert called == (["attention"] if native else [])
        called.clear()


@needs_native
@multiplied
@pytest.mark.parametrize("counts", [[3, 0, 21, 1], [300, 40], [600]])
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 7), (33, 16), (48, 80), (264, 40), (300, 352), (513, 31)])
def test_matmuls_by_groups(dtype: torch.dtype, counts: list[int], inputs: int, outputs: int):
    """Of sizes on either side of a vector, a tile, a strip and a depth."""
    torch.manual_seed(0)
    operands = [torch.randn(sum(counts), inputs).to(dtype), torch.randn(len(counts), outputs, inputs).to(dtype)]
    ours, our_grads = gradients(lambda x, w: grouped_linear(x, w, counts), operands)
    wide = [x.double() for x in operands]
    theirs, their_grads = gradients(lambda x, w: grouped_linear_loop(x, w, counts), wide)
    for a, b in zip([ours, *our_grads], [theirs, *their_grads], strict=True):
        assert close(a, b.to(dtype), dtype)


@needs_native
def test_a_linear_layer_of_a_slice():
    torch.manual_seed(0)
    layer, whole = Linear(24, 40), torch.randn(4, 6, 40)

    def ours_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight, "bias": bias}, x[..., 8:32])

    operands = [whole, layer.weight, layer.bias]
    ours, our_grads = gradients(ours_of, operands)
    theirs, their_grads = gradients(lambda x, weight, bias: F.linear(x[..., 8:32], weight, bias), operands)
    assert close(ours, theirs, FP32)
    assert all(close(a, b, FP32) for a, b in zip(our_grads, their_grads, strict=True))


@needs_native
@multiplied
@pytest.mark.parametrize("rows", [50, 51, 600])
@pytest.mark.parametrize("inputs", [33, 40, 64])
def test_gradients_of_weights_are_added(dtype: torch.dtype, rows: int, inputs: int, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    grad, x, before = (torch.randn(shape).to(dtype) for shape in ((rows, 20), (rows, inputs), (20, inputs)))
    called, run = [], linear.call
    monkeypatch.setattr(linear, "call", lambda name, *rest: (called.append(name), run(name, *rest)))
    found = weight_gradients(grad, x, [rows], before.clone(), add=True)
    assert called == ["linear_dw"]
    assert close(found, (before.double() + grad.double().t() @ x.double()).to(dtype), dtype)


@needs_native
@pytest.mark.parametrize("dtype", NATIVE[1:])
def test_under_autocast_matmuls_are_native_and_no_row_is_added(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """And equal to PyTorch's to the rounding of a bf16 output."""
    torch.manual_seed(0)
    called, run = [], linear.call
    monkeypatch.setattr(linear, "call", lambda name, dtypes, *rest: (called.append(dtypes), run(name, dtypes, *rest)))
    operands = [torch.randn(2, 17, 40), torch.randn(24, 40), torch.randn(24)]
    with torch.autocast("cpu", dtype):
        ours, our_grads = gradients(linear.linear, operands)
        theirs, their_grads = gradients(F.linear, operands)
        assert row_alignment(operands[0]) == 1
    assert called == 3 * [(dtype,)]
    assert close(ours, theirs, dtype) and {grad.dtype for grad in our_grads} == {FP32}
    assert all(close(a.to(dtype), b.to(dtype), dtype) for a, b in zip(our_grads, their_grads, strict=True))


@needs_native
@multiplied
def test_sums_are_in_fp32_and_nothing_around_a_slice_is_read_or_written(dtype: torch.dtype):
    """Sums of several depths differ from the exact ones by the rounding of a result alone; NaN lies around slices whose
    rows are of even and odd length and distance and begin at even and odd places, and around the result."""
    torch.manual_seed(0)
    for first, width, distance in ((0, 1301, 1400), (1, 1300, 1399), (3, 1301, 1305), (2, 1300, 1400)):
        whole = torch.full((70, distance), torch.nan, dtype=dtype)
        x = whole[:, first : first + width]
        x.copy_(torch.randn(70, width))
        weight = torch.randn(1, 33, width).to(dtype)
        exact = x.double() @ weight[0].double().t()
        found = products(x, weight, [70]).double()
        assert ((found - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()
        grad = torch.randn(70, 33).to(dtype)
        exact = grad.double().t() @ x.double()
        around = torch.full((3, 33, width), torch.nan, dtype=dtype)
        found = weight_gradients(grad, x, [70], around[1:2]).double()[0]
        assert ((found - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()
        assert around[::2].isnan().all()


@needs_native
@multiplied
def test_matmuls_do_not_depend_on_threads_or_on_their_neighbours(dtype: torch.dtype):
    """Each element is summed in one order, whoever computes it and however many rows there are."""
    torch.manual_seed(0)
    x, weight = torch.randn(700, 1301).to(dtype), torch.randn(2, 45, 1301).to(dtype)
    found, threads = {}, torch.get_num_threads()
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            y, grads = gradients(lambda x, w: grouped_linear(x, w, [400, 300]), [x, weight])
            alone = gradients(lambda x, w: grouped_linear(x, w, [700]), [x, weight[:1]])  # cut evenly for the threads
            found[count] = [y, *grads, alone[0], *alone[1]]
        few = grouped_linear(x[:5], weight, [5, 0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found.values() for a, b in zip(other, found[1], strict=True))
    assert torch.equal(few, found[1][0][:5])


@needs_native
def test_matmuls_refuse_what_does_not_fit():
    x, weight = torch.ones(6, 4), torch.ones(2, 3, 4)
    for bad in ((x[:, :3], weight, [4, 2]), (x, weight, [4, 1]), (x, weight, [6])):
        with pytest.raises(AssertionError):
            products(*bad)
    with pytest.raises(AssertionError):
        Linear(4, 3)(torch.ones(6, 5))


@needs_native
def test_what_is_frozen_has_no_gradient(monkeypatch: pytest.MonkeyPatch):
    """And takes no matmul."""
    called, run = [], linear.call
    monkeypatch.setattr(linear, "call", lambda name, *rest: (called.append(name), run(name, *rest)))
    for frozen, kernel in ((0, "linear_dw"), (1, "linear_dx")):
        leaves = [torch.ones(6, 4), torch.ones(3, 4)]
        leaves[1 - frozen].requires_grad_()
        grouped_linear(*leaves, [6]).sum().backward()
        assert leaves[frozen].grad is None and called == ["linear", kernel]
        called.clear()
