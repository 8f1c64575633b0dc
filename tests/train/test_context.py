"""Another context: the same function where the rope is the same, another behind YaRN, and recipes that say which."""

import pytest
import torch

from baleen.config import LongRope, RopeScaling, UserError
from baleen.model.rope import inverse_frequencies
from baleen.model.transformer import Transformer
from baleen.recipe import load_recipe, read_recipe
from baleen.train.context import with_context
from baleen.train.continued_recipe import ContextConfig, ContinuedRecipe

YARN = RopeScaling(factor=16.0, original_max_position_embeddings=256, mscale=1.0, mscale_all_dim=1.0)


@pytest.fixture
def model():
    model = Transformer(
        load_recipe("chitchat", ["model.num_hidden_layers=1", "model.num_nextn_predict_layers=0"]).model
    )
    model.init_weights(0)
    return model


def test_a_longer_context_is_the_same_function_with_the_same_rope(model):
    ids = torch.arange(40)[None]
    longer = with_context(model, ContextConfig(max_position_embeddings=4096))
    assert longer.config.max_position_embeddings == 4096 and longer.training == model.training
    assert torch.equal(longer(ids).hidden_BTd, model(ids).hidden_BTd)
    assert longer.model.embed_tokens.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    stretched = with_context(model, ContextConfig(max_position_embeddings=4096, rope_scaling=YARN))
    assert stretched.config.rope_scaling == YARN
    assert stretched.model.rotary.inv_freq[-1] == pytest.approx(model.model.rotary.inv_freq[-1] / 16)
    assert not torch.allclose(stretched(ids).hidden_BTd, model(ids).hidden_BTd, atol=1e-3)


def test_a_rope_of_another_size_is_refused(model):
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 8}
    context = ContextConfig.model_validate(
        {"max_position_embeddings": 16, "rope_scaling": {**rope, "short_factor": [1.0], "long_factor": [1.0]}}
    )
    with pytest.raises(UserError, match=r"\[context\]: longrope has 1 factors"):
        with_context(model, context)


def test_a_rope_that_the_base_has_is_not_dropped_without_a_word(model):
    """YaRN, or what an upcycled model holds its source's frequencies in."""
    long = LongRope(original_max_position_embeddings=256, short_factor=(2.0,) * 8, long_factor=(2.0,) * 8)
    for rope in (YARN, long):
        base = with_context(model, ContextConfig(max_position_embeddings=512, rope_scaling=rope))
        with pytest.raises(UserError, match=r"\[context\] names no rope_scaling, and the base has one"):
            with_context(base, ContextConfig(max_position_embeddings=4096))
        longer = with_context(base, ContextConfig(max_position_embeddings=4096, rope_scaling=rope))
        ids = torch.arange(40)[None]
        assert torch.equal(longer(ids).hidden_BTd, base(ids).hidden_BTd)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_angles_stay_float32_whatever_the_weights_are(model, dtype):
    rotary = with_context(model.to(dtype), ContextConfig(max_position_embeddings=4096, rope_scaling=YARN)).model.rotary
    assert rotary.inv_freq.dtype is torch.float32 and torch.equal(rotary.inv_freq, inverse_frequencies(rotary.config))


def test_both_stages_have_one_rope_and_it_can_be_left_out():
    first, second = (read_recipe(ContinuedRecipe, name) for name in ("extend-1k", "extend-4k"))
    assert first.context == second.context == ContextConfig(max_position_embeddings=4096, rope_scaling=YARN)
    assert (first.train.seq_len, second.train.seq_len) == (1024, 4096)
    plain = read_recipe(ContinuedRecipe, "extend-1k", ["context.rope_scaling=0"]).context
    assert plain is not None and plain.rope_scaling is None
