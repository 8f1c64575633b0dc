"""A model with another context: the same weights behind another rope."""

from __future__ import annotations

from baleen.config import ModelConfig, UserError, validated
from baleen.model.transformer import Transformer
from baleen.train.continued_recipe import ContextConfig


def with_context(model: Transformer, context: ContextConfig) -> Transformer:
    """The model for `context`, in the dtype and place of `model`. Raises UserError if the rope does not fit it."""
    if model.config.rope_scaling is not None and context.rope_scaling is None:
        raise UserError(
            "[context] names no rope_scaling, and the base has one, without which its weights are worth nothing: give "
            "[context.rope_scaling], the base's own (see its config.json) or another"
        )
    shape = model.config.model_dump() | context.model_dump()
    extended = Transformer(validated(ModelConfig, shape, "[context]"))
    extended = extended.to(device=model.device, dtype=model.model.norm.weight.dtype)
    extended.load_state_dict(model.state_dict())
    return extended.train(model.training)
