import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baleen.config import ModelConfig, UserError
from baleen.cost.architecture import from_model_config
from baleen.cost.flops import training_flops
from baleen.cost.scaling import LAWS, allocate, v3_shaped, v3_shaped_for


@given(st.sampled_from(sorted(LAWS)), st.floats(1e17, 1e28))
def test_the_budget_is_spent(law, compute):
    size, tokens, _ = allocate(compute, law)
    assert size * tokens == pytest.approx(compute)


def test_deepseek_law_has_its_published_token_exponent():
    assert allocate(3e20).tokens == pytest.approx(5.8316 * 3e20**0.4757, rel=1e-3)


def test_chinchilla_law_is_the_minimum_of_its_loss():
    compute = 5.76e23
    size, tokens, _ = allocate(compute, "chinchilla")

    def loss(parameters):
        return 1.8172 + 482.01 / parameters**0.3478 + 2085.43 / (compute / (6 * parameters)) ** 0.3658

    parameters = size / 6
    assert loss(parameters) < min(loss(0.98 * parameters), loss(1.02 * parameters))
    # Chinchilla's own budget: about 20 tokens a parameter is what made it famous.
    assert 15 < tokens / parameters < 30


def test_at_its_own_width_the_shape_is_v3():
    assert v3_shaped(7168) == from_model_config(ModelConfig())


@settings(deadline=None)
@given(st.floats(3e8, 5e12))
def test_shape_meets_the_size(flops_per_token):
    arch = v3_shaped_for(flops_per_token, 4096)
    found = training_flops(arch, 4096)
    neighbours = [training_flops(v3_shaped(max(256, arch.hidden_size + step)), 4096) for step in (-256, 256)]
    assert abs(found - flops_per_token) <= min(abs(n - flops_per_token) for n in neighbours) * (1 + 1e-9)


def test_errors():
    with pytest.raises(UserError, match="chinchilla"):
        allocate(1e20, "kaplan")
    with pytest.raises(UserError, match="name a model"):
        v3_shaped_for(1e3, 4096)
