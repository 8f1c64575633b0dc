"""The one vocabulary of Baleen: what a model is, and how settings are read, checked and written.

Keys of `ModelConfig` are those of Hugging Face's `deepseek_v3` config.json, the mixed `n_` and `num_` included.
This module imports no torch, so that the command line and the cost engine stay fast.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from math import isqrt
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class UserError(ValueError):
    """A user's mistake: one sentence that names the fault and the cure. The command line exits with 2 on it."""


class Strict(BaseModel):
    """A frozen model in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def to_toml(self) -> str:
        return tomli_w.dumps(without_null(self.model_dump()))


T = TypeVar("T", bound=BaseModel)
MAX_KEYS_LISTED = 12
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=1, lt=2**31)]  # of a network: a product of two is an int64
SizeOrZero = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]


class RopeScaling(Strict):
    """YaRN (arXiv 2309.00071) as the released config.json spells it.

    `mscale_all_dim` scales the softmax by (0.1 * mscale_all_dim * ln factor + 1)^2; without it the same factor
    goes into cos and sin instead (transformers' reading, which we follow).
    """

    rope_type: Literal["yarn"] = "yarn"
    factor: float = Field(gt=1.0)
    original_max_position_embeddings: Size
    beta_fast: float = Field(32.0, gt=0.0, lt=1e6)
    beta_slow: float = Field(1.0, gt=0.0, lt=1e6)
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @field_validator("mscale", "mscale_all_dim", mode="before")
    @classmethod
    def _zero_is_null(cls, value: Any) -> Any:
        return None if value == 0 else value  # TOML has no null, and released code reads 0 as absent


class LongRope(Strict):
    """A divisor of its own for each rotary pair (transformers' `longrope`): inv_freq_j = 1 / (factor_j * theta^(2j/P)).

    Baleen builds it with one list for all lengths; upcycled models hold their source's frequencies in it, with
    rope_theta = 1.
    """

    rope_type: Literal["longrope"] = "longrope"
    factor: float = Field(default=1.0, ge=1.0, le=1.0)
    attention_factor: float = Field(default=1.0, ge=1.0, le=1.0)
    original_max_position_embeddings: Size
    short_factor: tuple[Annotated[float, Field(gt=0.0)], ...]
    long_factor: tuple[Annotated[float, Field(gt=0.0)], ...]

    @model_validator(mode="after")
    def _one_list(self) -> LongRope:
        if self.short_factor != self.long_factor:
            raise ValueError("short_factor and long_factor differ: Baleen builds only one list for all lengths")
        return self


class ModelConfig(Strict):
    """Shape of a DeepSeek-V3 network. Symbols of arXiv 2412.19437 stand beside each key."""

    vocab_size: Size = 129280
    hidden_size: Size = 7168  # d
    intermediate_size: Size = 18432
    moe_intermediate_size: Size = 2048
    num_hidden_layers: Size = 61  # L
    num_attention_heads: Size = 128  # n_h
    q_lora_rank: Size | None = 1536  # d_c'; null: a plain q_proj
    kv_lora_rank: Size = 512  # d_c
    qk_nope_head_dim: Size = 128  # d_h
    qk_rope_head_dim: Size = 64  # d_h^R
    v_head_dim: Size = 128  # d_h
    n_routed_experts: Annotated[int, Field(ge=1, le=65536)] = 256  # N_r
    n_shared_experts: SizeOrZero = 1  # N_s
    num_experts_per_tok: Size = 8  # K_r
    n_group: Size = 8
    topk_group: Size = 4  # M
    first_k_dense_replace: SizeOrZero = 3
    routed_scaling_factor: float = Field(2.5, gt=0.0)
    norm_topk_prob: bool = True
    num_nextn_predict_layers: SizeOrZero = 1  # D
    max_position_embeddings: Size = 4096
    rope_theta: float = Field(10000.0, gt=0.0, lt=1e30)  # raised to powers in float32
    rope_scaling: Annotated[RopeScaling | LongRope, Field(discriminator="rope_type")] | None = None
    rope_interleave: bool = True
    rms_norm_eps: float = Field(1e-6, gt=0.0)
    initializer_range: float = Field(0.006, gt=0.0)
    # The norms of MLA's latents begin at sqrt(d / rank), not at 1 (model/initial.py). Told only where it is so.
    mla_scale_lora: bool = Field(False, exclude_if=lambda scaled: not scaled)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    bos_token_id: SizeOrZero = 0
    eos_token_id: SizeOrZero = 1

    @field_validator("q_lora_rank", "rope_scaling", mode="before")
    @classmethod
    def _zero_is_null(cls, value: Any) -> Any:
        return None if value == 0 else value  # TOML has no null

    @field_validator("rope_scaling", mode="before")
    @classmethod
    def _yarn_by_default(cls, value: Any) -> Any:
        return {"rope_type": "yarn", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _shapes(self) -> ModelConfig:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}: rotary pairs need an even number")
        if isinstance(self.rope_scaling, RopeScaling) and self.rope_theta <= 1.0:
            raise ValueError(f"rope_theta is {self.rope_theta}: YaRN stretches wavelengths, which need one above 1")
        if isinstance(self.rope_scaling, LongRope) and len(self.rope_scaling.short_factor) * 2 != self.qk_rope_head_dim:
            raise ValueError(
                f"longrope has {len(self.rope_scaling.short_factor)} factors; "
                f"qk_rope_head_dim = {self.qk_rope_head_dim} needs {self.qk_rope_head_dim // 2}"
            )
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts ({self.n_routed_experts}) is not a multiple of n_group ({self.n_group}): "
                f"take n_group = {_nearest_divisor(self.n_routed_experts, self.n_group)}"
            )
        if self.topk_group > self.n_group:
            raise ValueError(
                f"topk_group ({self.topk_group}) is larger than n_group ({self.n_group}): lower topk_group"
            )
        if self.n_group > 1 and self.experts_per_group < 2:
            raise ValueError(
                "a group is scored by its two best experts, so n_group must be at most n_routed_experts / 2 "
                f"= {self.n_routed_experts // 2}"
            )
        if self.num_experts_per_tok > self.topk_group * self.experts_per_group:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) is above the group limit: {self.topk_group} groups "
                f"of {self.experts_per_group} experts hold {self.topk_group * self.experts_per_group}; "
                "raise topk_group or lower num_experts_per_tok"
            )
        if self.first_k_dense_replace > self.num_hidden_layers + self.num_nextn_predict_layers:
            raise ValueError(
                f"first_k_dense_replace ({self.first_k_dense_replace}) is larger than the number of layers "
                f"({self.num_hidden_layers} + {self.num_nextn_predict_layers} of MTP)"
            )
        for key in ("bos_token_id", "eos_token_id"):
            if getattr(self, key) >= self.vocab_size:
                raise ValueError(f"{key} ({getattr(self, key)}) is outside the vocabulary of {self.vocab_size}")
        return self

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers cached per token and layer: d_c + d_h^R."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def experts_per_group(self) -> int:
        return self.n_routed_experts // self.n_group

    @property
    def num_layers_with_mtp(self) -> int:
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def is_moe_layer(self, layer_idx: int) -> bool:
        return layer_idx >= self.first_k_dense_replace


# What config.json must also say for other engines: constants of the architecture that Baleen does not vary.
HF_CONSTANTS: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "use_cache": True,
}
HF_MODEL_TYPES = ("deepseek_v3", "kimi_k2")  # Kimi K2 is the same architecture under a name of its own
# Keys of a released config.json that do not change the function a model computes.
HF_IGNORED = {
    "_name_or_path", "auto_map", "aux_loss_alpha", "chunk_size_feed_forward", "dtype", "ep_size", "head_dim",
    "id2label", "is_encoder_decoder", "label2id", "num_key_value_heads", "num_mtp_layers", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "qk_head_dim",
    "quantization_config", "return_dict", "seq_aux", "torch_dtype", "transformers_version", "unk_token_id",
}  # fmt: skip

# Keys of ours that config.json does not have: how the weights began is in the weights.
HF_UNTOLD = {"mla_scale_lora"}


def model_config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> the dict of a Hugging Face `deepseek_v3` config.json."""
    keys = config.model_dump(exclude=HF_UNTOLD)
    out = {**HF_CONSTANTS, **keys, "num_key_value_heads": config.num_attention_heads}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling.model_dump(exclude_none=True)
        out["rope_scaling"] = {**scaling, "type": scaling["rope_type"]}
    return dict(sorted(out.items()))


def model_config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    """The dict of a `deepseek_v3` or `kimi_k2` config.json, old or new spelling of the rope settings -> ModelConfig.

    Raises UserError for another architecture, or for a key that changes the function in a way Baleen has not built.
    """
    if raw.get("model_type") not in HF_MODEL_TYPES:
        raise UserError(f"config.json says model_type {raw.get('model_type')!r}; Baleen loads 'deepseek_v3'")
    raw = dict(raw)
    for key, value in HF_CONSTANTS.items():
        if key not in ("architectures", "model_type", "use_cache") and raw.get(key, value) != value:
            raise UserError(f"config.json has {key} = {raw[key]!r}; Baleen builds only {value!r}")
    rope = raw.pop("rope_parameters", None) or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json has rope_scaling = {rope!r}; Baleen needs an object, or null")
    rope = dict(rope)
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    known = {k: v for k, v in raw.items() if k in ModelConfig.model_fields and k not in HF_UNTOLD}
    unknown = sorted(set(raw) - set(known) - set(HF_CONSTANTS) - HF_IGNORED)
    if unknown:
        raise UserError(f"config.json has keys that Baleen does not know: {', '.join(map(ascii, unknown))}")
    known.setdefault("num_nextn_predict_layers", raw.get("num_mtp_layers", 0))  # who has MTP layers says so
    known["rope_theta"] = theta
    known["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    for key in ("n_group", "topk_group"):
        known[key] = known.get(key) or 1
    known["n_shared_experts"] = known.get("n_shared_experts") or 0
    if isinstance(known.get("eos_token_id"), list):
        known["eos_token_id"] = (known["eos_token_id"] or [1])[0]
    return validated(ModelConfig, known, "config.json")


def validated(kind: type[T], raw: dict[str, Any], where: str) -> T:
    """raw as a model of that kind. Raises UserError, which names `where` and, for an unknown key, what is near it."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        # a misspelt key is missing under its right name too: the spelling is what the user must hear of
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key, known = _located(kind, first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(f"{where}: unknown key {key!r}{_instead_of(str(first['loc'][-1]), known)}") from None
        message = " ".join(first["msg"].removeprefix("Value error, ").split())
        raise UserError(f"{where}: {key}: {message}" if key else f"{where}: {message}") from None


def _located(kind: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """The key as a user writes it, and those known where it stands.

    In a location the name of a union's model, as stages' "rl", stands as well: it tells which of them is meant.
    """
    models, inside, key = [kind], kind, []
    for part in location:
        named = [model for model in models if _is_name(part, model)]
        if len(models) > 1 and named:
            models = named
            continue
        key.append(str(part))
        inside = models[0]
        if part in inside.model_fields:
            models = list(_models_in(inside.model_fields[str(part)].annotation)) or models
    return ".".join(key), list(inside.model_fields)


def _is_name(part: int | str, model: type[BaseModel]) -> bool:
    return part == model.__name__ or any(get_args(f.annotation) == (part,) for f in model.model_fields.values())


def _instead_of(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(known)}" if len(known) <= MAX_KEYS_LISTED else ""


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Those of a union, of an optional or annotated type, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def without_null(value: Any) -> Any:
    """For TOML, which has no null: 0 stands for it."""
    if isinstance(value, dict):
        return {k: 0 if v is None else without_null(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_null(v) for v in value]
    return value


def _nearest_divisor(number: int, target: int) -> int:
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return min((d for s in small for d in (s, number // s)), key=lambda d: abs(d - target))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError if it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of the syntax, of UTF-8, or a number of too many digits
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value
