"""A model with another context: the same weights behind another rope."""

from __future__ import annotations

from baleen.config import ModelConfig, validated
from baleen.model.transformer import Transformer
from baleen.train.continued_recipe import ContextConfig


def with_context(model: Transformer, context: ContextConfig) -> Transformer:
    """The model for `context`, in the dtype and place of `model`. Raises UserError if the rope does not fit it."""
    shape = model.config.model_dump() | context.model_dump()
    extended = Transformer(validated(ModelConfig, shape, "[context]"))
    extended = extended.to(device=model.device, dtype=model.model.norm.weight.dtype)
    extended.model.rotary.reset_parameters()  # angles stay float32
    extended.load_state_dict(model.state_dict())
    return extended.train(model.training)
