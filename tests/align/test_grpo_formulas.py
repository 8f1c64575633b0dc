"""Advantages, token weights and the clipped loss: by hand, by finite reasoning, and (slow) against TRL."""

from types import SimpleNamespace

import pytest
import torch

from baleen.align.grpo import advantages, policy_loss, token_weights

VARIANTS = [
    # TRL's name of the loss, level of the ratio, clip above, KL coefficient
    ("grpo", "token", 0.2, 0.0),
    ("grpo", "token", 0.2, 0.04),
    ("grpo", "sequence", 0.2, 0.04),
    ("dapo", "token", 0.28, 0.0),
    ("dapo", "sequence", 0.28, 0.0),
    ("dapo", "sequence", 0.28, 0.04),
    ("dr_grpo", "token", 0.2, 0.0),
    ("dr_grpo", "sequence", 0.28, 0.04),
    ("dr_grpo", "token", 10.0, 0.001),
]
MAX_TOKENS = 9


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    N, T = 6, 7
    lengths = torch.tensor([7, 1, 4, 6, 3, 5])
    mask = (torch.arange(T) < lengths[:, None]).to(dtype)
    new = -draw(N, T).abs()
    old, reference = new + 0.4 * draw(N, T), new + 0.5 * draw(N, T)
    return new.requires_grad_(), old, reference, draw(N), mask


def ours(loss_type, level, high, kl_coef, rows=None, weights=None):
    new, old, reference, advantage, mask = inputs()
    if weights is None:
        weights = token_weights(mask, loss_type, MAX_TOKENS)
    rows = slice(None) if rows is None else rows
    loss = policy_loss(
        new[rows], old[rows], reference[rows] if kl_coef else None, advantage[rows], mask[rows], weights[rows],
        clip_eps=0.2, clip_eps_high=high, kl_coef=kl_coef, importance_level=level,
    )  # fmt: skip
    loss.total.backward()
    return loss.total.detach(), new.grad


@pytest.mark.slow
@pytest.mark.parametrize(("loss_type", "level", "high", "kl_coef"), VARIANTS)
def test_loss_and_gradient_are_trls(loss_type, level, high, kl_coef):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    new, old, reference, advantage, mask = inputs()
    tokens = mask.sum()

    class Accelerator:
        num_processes = 1

        def gather(self, tensor):
            return tensor

        def reduce(self, tensor, reduction):
            return tensor

    class Anything(dict):
        def __missing__(self, key):
            return self.setdefault(key, SimpleNamespace(append=lambda value: None))

    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros_like(new), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=level, beta=kl_coef, loss_type=loss_type, epsilon_low=0.2, epsilon_high=high,
        use_vllm=False, max_completion_length=MAX_TOKENS, current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False, model=SimpleNamespace(training=True), accelerator=Accelerator(),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _metrics={"train": Anything()},
    )  # fmt: skip
    batch = {
        "prompt_ids": torch.zeros(6, 2, dtype=torch.long), "prompt_mask": torch.ones(6, 2, dtype=torch.long),
        "completion_ids": torch.zeros(6, 7, dtype=torch.long), "completion_mask": mask, "advantages": advantage,
        "old_per_token_logps": old, "ref_per_token_logps": reference, "num_items_in_batch": tokens,
    }  # fmt: skip
    theirs = trainer._compute_loss(stub, None, batch)
    theirs.backward()
    loss, gradient = ours(loss_type, level, high, kl_coef)
    torch.testing.assert_close(loss, theirs.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, new.grad, rtol=0, atol=1e-5)
    assert gradient.abs().max() > 1e-3  # the comparison is of something


@pytest.mark.parametrize(("loss_type", "level", "high", "kl_coef"), VARIANTS)
def test_micro_batches_add_up_to_the_whole_update(loss_type, level, high, kl_coef):
    whole, gradient = ours(loss_type, level, high, kl_coef)
    *_, mask = inputs()
    weights = token_weights(mask, loss_type, MAX_TOKENS)
    parts = [ours(loss_type, level, high, kl_coef, torch.tensor(rows), weights) for rows in ([0, 3], [1, 2, 4], [5])]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    torch.testing.assert_close(sum(grad for _, grad in parts), gradient)


def test_advantages_compare_within_the_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [5.0, 5.0, 5.0, 5.0], [2.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    found = advantages(rewards, "group")
    torch.testing.assert_close(found[0], torch.tensor([0.866, -0.866, -0.866, 0.866]).double(), rtol=0, atol=1e-3)
    assert found[1].abs().max() == 0  # no variance, nothing to learn, and no division by zero
    torch.testing.assert_close(advantages(rewards, "none")[2], torch.tensor([1.5, -0.5, -0.5, -0.5]).double())
    for alike in (0.3, 1.2, 1.3):  # the mean of sixteen of them is another number, in float32 as in float64
        for scale in ("group", "batch", "none"):
            both = torch.cat((torch.full((1, 16), alike), torch.arange(16.0)[None]))
            assert not advantages(both, scale)[0].any() and advantages(both, scale)[1].any()
    batch = advantages(rewards, "batch")
    torch.testing.assert_close(batch * (rewards.std() + 1e-4), advantages(rewards, "none"))


def test_the_first_step_has_the_policy_gradient():
    """With pi = pi_old the gradient of a token is -A times its weight, whatever the clip."""
    new, _, _, advantage, mask = inputs()
    weights = token_weights(mask, "grpo", MAX_TOKENS)
    loss = policy_loss(new, new.detach(), None, advantage, mask, weights, clip_eps=0.2, clip_eps_high=0.2, kl_coef=0.0)
    loss.total.backward()
    torch.testing.assert_close(new.grad, -advantage[:, None] * weights)
    assert loss.clipped == 0


def test_a_token_beyond_the_clip_has_no_gradient():
    new = torch.tensor([[0.5, 0.5]], dtype=torch.float64, requires_grad=True)  # ratio 1.65
    for advantage, moves in ((1.0, False), (-1.0, True)):
        new.grad = None
        loss = policy_loss(
            new, torch.zeros(1, 2).double(), None, torch.tensor([advantage]).double(), torch.ones(1, 2).double(),
            torch.ones(1, 2).double(), clip_eps=0.2, clip_eps_high=0.2, kl_coef=0.0,
        )  # fmt: skip
        loss.total.backward()
        assert bool(new.grad.abs().sum() > 0) is moves
        assert loss.clipped == (0 if moves else 2)


def test_the_kl_estimate_is_never_negative_and_pulls_back():
    new, old, reference, advantage, mask = inputs()
    weights = token_weights(mask, "dapo", MAX_TOKENS)
    loss = policy_loss(
        new, new.detach(), reference, 0 * advantage, mask, weights, clip_eps=0.2, clip_eps_high=0.2, kl_coef=1.0
    )
    loss.total.backward()
    assert loss.kl > 0
    away = (new.detach() > reference) & (mask > 0)
    assert (new.grad[away] > 0).all()  # descending lowers what the reference finds too likely


@pytest.mark.parametrize(("loss_type", "total"), [("grpo", 1.0), ("dapo", 1.0), ("dr_grpo", 26 / 54)])
def test_token_weights(loss_type, total):
    *_, mask = inputs()
    weights = token_weights(mask, loss_type, MAX_TOKENS)
    assert weights[mask == 0].abs().sum() == 0
    assert weights.sum().item() == pytest.approx(total)
    if loss_type == "grpo":
        torch.testing.assert_close(weights.sum(1), torch.full((6,), 1 / 6, dtype=torch.float64))
    else:
        assert len(weights[mask > 0].unique()) == 1
    emptied = mask.clone()
    emptied[2] = 0  # an answer that was cut off and is left out
    assert token_weights(emptied, loss_type, MAX_TOKENS).isfinite().all()
