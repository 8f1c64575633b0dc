"""What continued training is made of: a base that exists, text, and what to train of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from baleen.config import (
    Count,
    Fraction,
    LongRope,
    ModelConfig,
    Momentum,
    NotNegative,
    Positive,
    RopeScaling,
    Strict,
    validated,
)
from baleen.recipe import CostConfig, DataConfig, Knot, Recipe

OWN_KEYS = {"lr_schedule", "router_jitter", "expert_noise"}  # of [train], which pretraining does not have


class OwnTextConfig(Strict):
    """The model's own greedy continuations: what drafts are made for when it is used."""

    prompts: Count = 0  # different beginnings of training documents to go on from; 0: none
    prompt_tokens: Positive = 32  # of a document that no assistant answers; a conversation is cut where one begins
    max_tokens: Positive = 128
    share: Fraction = 0.5  # of each batch


class ContextConfig(Strict):
    """The context that the model gets, and the rope for it: keys of config.json, in place of the base's."""

    max_position_embeddings: Positive
    rope_scaling: RopeScaling | LongRope | None = None  # none: only where the base has none either

    @field_validator("rope_scaling", mode="before")
    @classmethod
    def _zero_is_null(cls, value: Any) -> Any:
        return None if value == 0 else value  # TOML has no null


class ContinuedConfig(Strict):
    """How it is trained. `lr_schedule` has the knots of a recipe's schedule.lr."""

    tokens: Positive
    batch_tokens: Positive
    seq_len: Positive
    minutes: NotNegative = 0.0  # of steps; 0: no limit. Else lr_schedule ends by the clock if that comes first
    micro_batch_size: Count = 0  # sequences a forward; 0: the whole batch
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    lr: float = Field(gt=0.0)
    lr_schedule: Annotated[tuple[Knot, ...], Field(min_length=1)] = (
        ("0%", 0.0, "linear"),
        ("5%", 1.0, "linear"),
        ("100%", 0.0, "cosine"),
    )
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0.0)
    weight_decay: NotNegative = 0.1
    clip_norm: float = Field(1.0, gt=0.0)
    mtp_loss_weight: NotNegative = 0.3  # of the whole model; MTP layers alone have no other loss
    bias_update_speed: NotNegative = 0.001
    balance_loss_weight: NotNegative = 1e-4  # of the whole model, as mtp_loss_weight
    router_jitter: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # inputs of routers times 1 +- this, so copies part
    expert_noise: NotNegative = 0.0  # on routed experts before the first step of all, a share of their weights' spread
    document_mask: bool = True  # attend within a document only; MTP layers alone always do
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_every: Count = 0  # steps; 0: only at the end
    keep_checkpoints: Positive = 2


class ContinuedRecipe(Strict):
    """`base` is a RUN, whose shape and tokenizer are kept, its context aside if there is a [context]."""

    name: str = "continued"
    base: Annotated[str, Field(min_length=1)]
    data: DataConfig
    context: ContextConfig | None = None
    own_text: OwnTextConfig = OwnTextConfig()
    train: ContinuedConfig
    cost: CostConfig = CostConfig()

    @field_validator("context", mode="before")
    @classmethod
    def _zero_is_null(cls, value: Any) -> Any:
        return None if value == 0 else value

    @model_validator(mode="after")
    def _fits(self) -> ContinuedRecipe:
        if self.train.batch_tokens % self.train.seq_len:
            raise ValueError(
                f"train.batch_tokens ({self.train.batch_tokens}) is not a multiple of train.seq_len "
                f"({self.train.seq_len})"
            )
        return self

    def training(self, model: ModelConfig, *, document_mask: bool) -> Recipe:
        """As a recipe of training on that model, which the trainer takes. Raises UserError if it does not fit."""
        train = self.train.model_dump(exclude=OWN_KEYS) | {"document_mask": document_mask}
        parts = {"data": self.data.model_dump(), "cost": self.cost.model_dump(), "model": model.model_dump()}
        raw = {"name": self.name, "train": train, "schedule": {"lr": self.train.lr_schedule}, **parts}
        return validated(Recipe, raw, f"recipe {self.name}")
