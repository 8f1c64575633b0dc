"""Our Muon on stacks against torch.optim.Muon on each matrix of them."""

import pytest
import torch

from baleen.train.muon import Muon, orthogonalize

SHAPES = {"square": (6, 6), "tall": (16, 4), "wide": (5, 12)}
SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}


def gradients(shape, steps, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def run_ours(start, grads, matrices, dtype, **settings):
    parameter = torch.nn.Parameter(start.clone())
    optimizer = Muon([{"params": [parameter], "matrices": matrices}], dtype=dtype, **settings)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


def run_torchs(start, grads, **settings):
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Muon([parameter], nesterov=True, adjust_lr_fn="match_rms_adamw", **settings)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("settings", [SETTINGS, {**SETTINGS, "weight_decay": 0.0, "momentum": 0.5}])
def test_one_matrix_equals_torchs(shape, settings):
    start, grads = torch.randn(shape, generator=torch.Generator().manual_seed(0)), gradients(shape, 5)
    theirs = run_torchs(start, grads, **settings)
    moved = (theirs - start).norm()
    # torch iterates in bf16: ours in bf16 differs by rounding, ours in fp32 by the rounding of theirs
    assert (run_ours(start, grads, 1, torch.bfloat16, **settings) - theirs).norm() / moved < 0.01
    assert (run_ours(start, grads, 1, torch.float32, **settings) - theirs).norm() / moved < 0.04


@pytest.mark.parametrize("matrices", [1, 2])
@pytest.mark.parametrize("shape", [(3, 16, 4), (3, 8, 12)], ids=["tall", "wide"])
def test_every_slice_of_a_stack_equals_torchs(shape, matrices):
    """matrices = 2: the gate and up halves of gate_up_proj are two matrices, with the learning rate of their shape."""
    start, grads = torch.randn(shape, generator=torch.Generator().manual_seed(0)), gradients(shape, 4)
    ours = run_ours(start, grads, matrices, torch.bfloat16, **SETTINGS)
    rows = shape[1] // matrices
    for expert in range(shape[0]):
        for half in range(matrices):
            part = (expert, slice(half * rows, (half + 1) * rows))
            theirs = run_torchs(start[part], [grad[part] for grad in grads], **SETTINGS)
            assert (ours[part] - theirs).norm() / (theirs - start[part]).norm() < 0.01


def test_stack_equals_its_slices_exactly_in_float64():
    shape = (4, 6, 10)
    start, grads = torch.randn(shape, dtype=torch.float64), [g.double() for g in gradients(shape, 3)]
    stack = run_ours(start, grads, 2, torch.float64, **SETTINGS)
    for expert in range(4):
        for rows in (slice(0, 3), slice(3, 6)):
            single = run_ours(start[expert, rows], [g[expert, rows] for g in grads], 1, torch.float64, **SETTINGS)
            torch.testing.assert_close(stack[expert, rows], single, rtol=1e-12, atol=1e-12)


def test_matrices_of_one_shape_step_together_as_each_alone(monkeypatch):
    shapes = [(6, 10), (10, 6), (6, 10), (6, 10), (9, 10), (9, 10)]  # those of 90 numbers are large
    monkeypatch.setattr("baleen.train.muon.SMALL", 89)
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    grads = [[g.double() for g in gradients(shape, 3, seed)] for seed, shape in enumerate(shapes)]
    parameters = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = Muon([{"params": parameters, "matrices": 1}], dtype=torch.float64, **SETTINGS)
    batches = []
    monkeypatch.setattr(
        "baleen.train.muon.orthogonalize", lambda g, dtype: batches.append(len(g)) or orthogonalize(g, dtype)
    )
    for step in range(3):
        for parameter, of_it in zip(parameters, grads, strict=True):
            parameter.grad = of_it[step].clone()
        optimizer.step()
    assert batches == [3, 1, 1, 1] * 3
    monkeypatch.undo()
    for parameter, start, of_it in zip(parameters, starts, grads, strict=True):
        alone = run_ours(start, of_it, 1, torch.float64, **SETTINGS)
        torch.testing.assert_close(parameter.detach(), alone, rtol=1e-12, atol=1e-12)


def test_halves_apart_are_not_the_whole():
    start, grads = torch.randn(2, 8, 6), gradients((2, 8, 6), 1)
    whole, halves = (run_ours(start, grads, m, torch.float32, **SETTINGS) for m in (1, 2))
    assert (whole - halves).norm() / (whole - start).norm() > 0.1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_orthogonalize_keeps_directions_and_evens_out_lengths(shape):
    # Newton-Schulz of these coefficients brings singular values near 1, not to 1
    grad = gradients((2, *shape), 1)[0].double()
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    within = u.mT @ orthogonalize(grad, torch.float64) @ vh.mT
    lengths = within.diagonal(dim1=-2, dim2=-1)
    assert lengths.min() > 0.5 and lengths.max() < 1.3
    torch.testing.assert_close(within, torch.diag_embed(lengths), rtol=0, atol=1e-9)


def test_parameters_without_gradient_stay():
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    Muon([{"params": [parameter]}], **SETTINGS).step()
    assert parameter.equal(torch.ones(3, 3))
