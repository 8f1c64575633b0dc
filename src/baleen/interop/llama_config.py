"""What a Llama's config.json and generation_config.json say. Numbers of the wrong kind are refused by their key."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

from baleen.config import Size, SizeOrZero, UserError, read_json, validated

Factor = Annotated[float, Field(gt=0.0, lt=1e30)]  # float32 holds it
Ids = Annotated[list[SizeOrZero], Field(min_length=1), BeforeValidator(lambda v: v if isinstance(v, list) else [v])]
PROVENANCE = ("_from_model_config", "transformers_version")  # of a generation_config.json: true of the source alone


class Foreign(BaseModel):
    """What is read must be of its type; other keys are left alone."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class Rope(Foreign):
    rope_theta: Factor = 10000.0
    partial_rotary_factor: float = 1.0

    def scaled(self, frequencies: Tensor) -> Tensor:
        """Those of plain rope with this theta, float32 [d/2] -> this rope's."""
        return frequencies


class LinearRope(Rope):
    factor: Factor

    def scaled(self, frequencies: Tensor) -> Tensor:
        return frequencies / self.factor


class Llama3Rope(Rope):
    """Long waves are stretched by `factor`, short ones kept, those between interpolated."""

    factor: Factor
    low_freq_factor: Factor
    high_freq_factor: Factor
    original_max_position_embeddings: Size

    @model_validator(mode="after")
    def _ordered(self) -> Llama3Rope:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must be below high_freq_factor")
        return self

    def scaled(self, frequencies: Tensor) -> Tensor:
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


ROPES: dict[str, type[Rope]] = {"default": Rope, "linear": LinearRope, "llama3": Llama3Rope}


class LlamaConfig(Foreign):
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None  # as many as heads
    head_dim: Size | None = None  # hidden_size / heads
    max_position_embeddings: Size = 2048
    rms_norm_eps: Factor = 1e-6
    tie_word_embeddings: bool = False
    bos_token_id: SizeOrZero = 1
    eos_token_id: Ids = [2]
    rope_theta: Factor = 10000.0
    partial_rotary_factor: float = 1.0
    rope_parameters: dict[str, Any] = {}
    rope_scaling: dict[str, Any] = {}  # the older spelling

    def rope(self, where: str) -> Rope:
        """Raises UserError, naming `where`, for another kind of rope and for one that turns only part of a head."""
        raw = {"rope_theta": self.rope_theta, "partial_rotary_factor": self.partial_rotary_factor}
        raw |= _without_nulls(self.rope_parameters or self.rope_scaling)
        kind = str(raw.get("rope_type") or raw.get("type") or "default")
        if kind not in ROPES:
            raise UserError(f"{where} has rope_type {kind!r}: Baleen upcycles {', '.join(ROPES)}")
        rope = validated(ROPES[kind], raw, f"{where}, rope")
        if rope.partial_rotary_factor != 1.0:
            raise UserError(f"{where} turns only part of each head (partial_rotary_factor): Baleen upcycles whole ones")
        return rope


class _Ends(Foreign):
    eos_token_id: Ids


def llama_config(raw: dict[str, Any], where: str) -> LlamaConfig:
    """Raises UserError, naming `where`, for a key that is missing or of the wrong type; null is absent."""
    return validated(LlamaConfig, _without_nulls(raw), where)


def generation_settings(directory: Path, config: LlamaConfig) -> dict[str, Any]:
    """generation_config.json, with every end token; those of config.json if it has none.

    Raises UserError if it is no JSON object or its end tokens are no ids.
    """
    file = directory / "generation_config.json"
    raw = _without_nulls(read_json(file)) if file.is_file() else {}
    ends = validated(_Ends, {"eos_token_id": config.eos_token_id, **raw}, str(file)).eos_token_id
    kept = {key: value for key, value in raw.items() if key not in PROVENANCE}
    return kept | {"eos_token_id": ends if len(ends) > 1 else ends[0]}


def _without_nulls(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if value is not None}
