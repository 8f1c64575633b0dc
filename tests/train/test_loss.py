"""The fused loss and the alignment of its targets, against computations spelled out token by token."""

import pytest
import torch
import torch.nn.functional as F

from baleen.model.moe import sequence_balance_loss
from baleen.train import loss as loss_module
from baleen.train.loss import IGNORED, cross_entropy, training_loss

F64 = {"rtol": 1e-10, "atol": 1e-12}


def random_ids(batch, length, vocab=97, seed=1):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (rows,), generator=generator)
    return hidden, weight, targets


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows_at_once", [1, 4, 5, 100])
def test_fused_cross_entropy_equals_pytorchs_with_its_gradients(rows_at_once, dtype, monkeypatch):
    monkeypatch.setattr(loss_module, "ROWS_AT_ONCE", rows_at_once)
    hidden, weight, targets = inputs(13)
    targets[[0, 6, 7, 12]] = IGNORED
    theirs = F.cross_entropy(F.linear(hidden, weight), targets, ignore_index=IGNORED)
    theirs_grads = torch.autograd.grad(3 * theirs, (hidden, weight))
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    ours = cross_entropy(hidden, weight, targets)
    ours_grads = torch.autograd.grad(3 * ours, (hidden, weight))
    near = F64 if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for a, b in zip((ours, *ours_grads), (theirs, *theirs_grads), strict=True):
        torch.testing.assert_close(a, b.to(dtype), **near)


def test_fused_cross_entropy_passes_gradcheck(monkeypatch):
    monkeypatch.setattr(loss_module, "ROWS_AT_ONCE", 2)
    hidden, weight, targets = inputs(5)
    targets[1] = IGNORED
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy(h, w, targets), (hidden, weight))


def test_all_targets_ignored_is_zero_and_not_nan():
    hidden, weight, targets = inputs(4)
    value = cross_entropy(hidden, weight, torch.full_like(targets, IGNORED))
    value.backward()
    assert value.item() == 0.0
    assert hidden.grad.abs().max() == 0.0 and weight.grad.abs().max() == 0.0


def test_without_gradient_it_is_the_same_value():
    hidden, weight, targets = inputs(7)
    with torch.no_grad():
        value = cross_entropy(hidden, weight, targets)
    assert not value.requires_grad
    torch.testing.assert_close(value, cross_entropy(hidden, weight, targets).detach(), **F64)


def test_bf16_autocast_is_close_to_fp32():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator, requires_grad=True)
    weight = (0.2 * torch.randn(50, 32, generator=generator)).requires_grad_()
    targets = torch.randint(0, 50, (64,), generator=generator)
    exact = cross_entropy(hidden, weight, targets)
    exact_grads = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        rough = cross_entropy(hidden, weight, targets)
    rough_grads = torch.autograd.grad(rough, (hidden, weight))
    assert rough.dtype == torch.float32
    assert rough.item() != exact.item()  # else nothing was multiplied in bf16
    torch.testing.assert_close(rough, exact, rtol=5e-3, atol=0)
    for a, b in zip(rough_grads, exact_grads, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 0.02


def test_bf16_gradients_of_many_chunks_add_up_in_fp32(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 32, generator=generator)
    weight = (0.2 * torch.randn(50, 32, generator=generator)).requires_grad_()
    targets = torch.randint(0, 50, (512,), generator=generator)
    (exact,) = torch.autograd.grad(cross_entropy(hidden, weight, targets), weight)
    errors = []
    for rows_at_once in (512, 2):
        monkeypatch.setattr(loss_module, "ROWS_AT_ONCE", rows_at_once)
        with torch.autocast("cpu", torch.bfloat16):
            rough = cross_entropy(hidden, weight, targets)
        (grad,) = torch.autograd.grad(rough, weight)
        errors.append((grad - exact).norm() / exact.norm())
    assert 0 < errors[1] < 1.5 * errors[0]


def spelled_out(model, tokens, documents=None, mask=None):
    """Main and MTP losses, one cross-entropy a position: (mean nats of the trunk, [mean nats of each depth])."""
    B, T = tokens.shape[0], tokens.shape[1] - 1
    learnt = torch.ones_like(tokens) if mask is None else mask

    def mean_nats(hidden, offset):
        nats = []
        for b in range(B):
            for i in range(hidden.shape[1]):
                if learnt[b, i + offset]:
                    log_probs = model.logits(hidden[b, i]).log_softmax(-1)
                    nats.append(-log_probs[tokens[b, i + offset]])
        return torch.stack(nats).mean()

    hidden = model(tokens[:, :T], document_ids_BT=None if documents is None else documents[:, :T]).hidden_BTd
    main, depths = mean_nats(hidden, 1), []
    for k in range(1, model.config.num_nextn_predict_layers + 1):
        length = T - k
        hidden = model.predict_ahead(
            k - 1,
            hidden[:, :length],
            torch.stack([tokens[:, i + k] for i in range(length)], 1),
            document_ids_BT=None if documents is None else torch.stack([documents[:, i] for i in range(length)], 1),
        ).hidden_BTd
        depths.append(mean_nats(hidden, k + 1))
    return main, depths


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("marked", [False, True])
def test_alignment_of_targets(tiny_model, depth, marked):
    model = tiny_model(dtype=torch.float64, num_nextn_predict_layers=depth)
    tokens = random_ids(2, 10)
    documents = mask = None
    if marked:
        documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 2], [3] * 6 + [4] * 4])
        mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1, 1, 0, 1, 1]])
    loss = training_loss(
        model, tokens, mtp_loss_weight=0.3, balance_loss_weight=0.0, document_ids=documents, loss_mask=mask
    )
    main, depths = spelled_out(model, tokens, documents, mask)
    mean_of_depths = sum(depths) / depth if depth else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(loss.main, main.detach(), **F64)
    torch.testing.assert_close(loss.mtp, mean_of_depths.detach() if depth else mean_of_depths, **F64)
    torch.testing.assert_close(loss.total, main + 0.3 * mean_of_depths, **F64)
    assert len(loss.loads) == len(model.gates)


def test_the_mtp_input_is_not_its_target(tiny_model):
    """A copier sees its target: then the loss of the last position would depend on no other token."""
    model = tiny_model(dtype=torch.float64)
    tokens = random_ids(1, 8)
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 97  # only ever a target
    _, routings = model(tokens[:, :-1])
    weights = {"mtp_loss_weight": 1.0, "balance_loss_weight": 0.0}
    a, b = training_loss(model, tokens, **weights), training_loss(model, changed, **weights)
    assert [x.tolist() for x in a.loads] == [x.tolist() for x in b.loads]  # no layer has seen it
    assert a.mtp != b.mtp and a.main != b.main
    assert len(routings) + 1 == len(a.loads)


def test_tokens_of_another_document_change_nothing(tiny_model):
    model = tiny_model(dtype=torch.float64)
    tokens = random_ids(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    mask = (documents == 1).long()
    mask[0, 5:7] = 0  # targets of a hidden state of document 0, which MTP has at one token more
    changed = tokens.clone()
    changed[0, :5] = random_ids(1, 5, seed=9)
    weights = {"mtp_loss_weight": 0.5, "balance_loss_weight": 0.0, "document_ids": documents, "loss_mask": mask}
    kept, other = training_loss(model, tokens, **weights), training_loss(model, changed, **weights)
    torch.testing.assert_close(kept.main, other.main, **F64)
    torch.testing.assert_close(kept.mtp, other.mtp, **F64)
    assert kept.mtp > 0
    open_weights = {**weights, "document_ids": None}
    kept, other = training_loss(model, tokens, **open_weights), training_loss(model, changed, **open_weights)
    assert kept.main != other.main and kept.mtp != other.mtp


def test_lambda_and_alpha_enter_linearly_with_their_gradients(tiny_model):
    model = tiny_model(dtype=torch.float64)
    tokens = random_ids(3, 9)
    router = model.gates[0].weight

    def run(lam, alpha):
        loss = training_loss(model, tokens, mtp_loss_weight=lam, balance_loss_weight=alpha)
        return loss.total, torch.autograd.grad(loss.total, router)[0]

    (base, base_grad), (lam, lam_grad), (alpha, alpha_grad) = run(0.0, 0.0), run(0.1, 0.0), run(0.1, 0.01)
    total, grad = run(0.5, 0.04)
    assert lam > base and alpha > lam
    torch.testing.assert_close(total, base + 5 * (lam - base) + 4 * (alpha - lam), **F64)
    torch.testing.assert_close(grad, base_grad + 5 * (lam_grad - base_grad) + 4 * (alpha_grad - lam_grad), **F64)
    assert (alpha_grad - lam_grad).abs().max() > 0


def test_balance_is_the_sum_over_gates_of_the_mean_over_sequences(tiny_model):
    model = tiny_model(dtype=torch.float64, num_nextn_predict_layers=0)
    tokens = random_ids(2, 9)
    _, routings = model(tokens[:, :-1])
    expected = sum(sequence_balance_loss(r, 2, model.config.num_experts_per_tok) for r in routings)
    loss = training_loss(model, tokens, mtp_loss_weight=0.0, balance_loss_weight=0.5)
    torch.testing.assert_close(loss.balance, expected.detach(), **F64)
    torch.testing.assert_close(loss.total.detach(), loss.main + 0.5 * expected.detach(), **F64)


def test_loads_count_every_choice_of_every_gate(tiny_model):
    model = tiny_model(num_nextn_predict_layers=2)
    B, T, K = 3, 10, model.config.num_experts_per_tok
    loss = training_loss(model, random_ids(B, T + 1), mtp_loss_weight=0.3, balance_loss_weight=1e-4)
    assert [int(load.sum()) for load in loss.loads] == [B * T * K] * 2 + [B * (T - 1) * K, B * (T - 2) * K]
    assert all(load.shape == (8,) and load.dtype == torch.int64 for load in loss.loads)


def test_a_weight_of_zero_leaves_the_mtp_layers_out(tiny_model):
    model = tiny_model()
    loss = training_loss(model, random_ids(2, 9), mtp_loss_weight=0.0, balance_loss_weight=1e-4)
    loss.total.backward()
    assert loss.mtp == 0 and len(loss.loads) == 2
    assert all(p.grad is None for p in model.mtp_layers[0].parameters())


def test_a_network_without_experts_has_no_balance_loss(tiny_model):
    model = tiny_model(first_k_dense_replace=3, num_nextn_predict_layers=0)
    loss = training_loss(model, random_ids(2, 9), mtp_loss_weight=0.3, balance_loss_weight=1.0)
    loss.total.backward()
    assert loss.balance == 0 and loss.total == loss.main and loss.loads == []
