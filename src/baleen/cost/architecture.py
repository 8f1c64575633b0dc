"""The shape of any network whose cost is counted: dense or mixture of experts, GQA or MLA, full or sliding window.

Wider than `ModelConfig`, which describes only what Baleen builds; key names are those of Hugging Face's config.json.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from baleen.config import Count, Fraction, ModelConfig, Positive, Strict, UserError

# Keys of the `dims` column of cost_cases.csv and what they are called here.
DIMS_KEYS = {
    "L": "num_hidden_layers", "d": "hidden_size", "V": "vocab_size", "H": "num_attention_heads",
    "KV": "num_key_value_heads", "ff": "intermediate_size", "nm": "ffn_matrices", "qn": "qk_nope_head_dim",
    "qr": "qk_rope_head_dim", "vh": "v_head_dim", "ql": "q_lora_rank", "kvl": "kv_lora_rank",
    "E": "n_routed_experts", "k": "num_experts_per_tok", "sh": "n_shared_experts", "mff": "moe_intermediate_size",
    "Ld": "first_k_dense_replace", "mtp": "num_nextn_predict_layers",
}  # fmt: skip


class Architecture(Strict):
    """A transformer's shape. `kv_lora_rank` marks latent attention (MLA); `n_routed_experts` a mixture of experts.

    `qk_nope_head_dim` is the whole query and key head size where `qk_rope_head_dim` is 0 (GQA and MHA rotate in place).
    """

    num_hidden_layers: Positive
    hidden_size: Positive
    vocab_size: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    qk_nope_head_dim: Positive
    qk_rope_head_dim: Count = 0
    v_head_dim: Positive
    q_lora_rank: Positive | None = None
    kv_lora_rank: Positive | None = None
    intermediate_size: Positive
    ffn_matrices: Annotated[int, Field(ge=2, le=3)] = 3  # 3: gate, up, down (SwiGLU); 2: up, down (GELU)
    n_routed_experts: Count = 0
    num_experts_per_tok: Count = 0
    n_shared_experts: Count = 0
    moe_intermediate_size: Count = 0
    first_k_dense_replace: Count = 0
    num_nextn_predict_layers: Count = 0  # MTP modules
    sliding_window: Positive | None = None
    sliding_share: Fraction = 0.0  # of the layers
    tie_word_embeddings: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Architecture:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads do not divide into {self.num_key_value_heads} key/value heads"
            )
        if self.n_routed_experts and not (
            0 < self.num_experts_per_tok <= self.n_routed_experts and self.moe_intermediate_size
        ):
            raise ValueError("a mixture of experts needs moe_intermediate_size and 1 <= experts per token <= experts")
        return self

    @property
    def is_latent(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def is_moe(self) -> bool:
        return self.n_routed_experts > 0

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def dense_layers(self) -> int:
        return min(self.first_k_dense_replace, self.num_hidden_layers) if self.is_moe else self.num_hidden_layers

    @property
    def moe_layers(self) -> int:
        return self.num_hidden_layers - self.dense_layers

    @property
    def mtp_moe_modules(self) -> int:
        """MTP modules whose block is a mixture of experts: those whose layer id reaches first_k_dense_replace."""
        if not self.is_moe:
            return 0
        end = self.num_hidden_layers + self.num_nextn_predict_layers
        return end - min(max(self.first_k_dense_replace, self.num_hidden_layers), end)


def from_model_config(config: ModelConfig) -> Architecture:
    """The costed shape of a network that Baleen builds."""
    shared = {key: getattr(config, key) for key in ModelConfig.model_fields if key in Architecture.model_fields}
    return Architecture(**shared, num_key_value_heads=config.num_attention_heads)


def from_dims(dims: dict[str, Any]) -> Architecture:
    """The `dims` object of cost_cases.csv (see cost_cases.md) -> Architecture. Raises UserError naming the bad key."""
    if not isinstance(dims, dict):
        raise UserError(f"dims must be an object of {', '.join(DIMS_KEYS)}, mla, hd and swa, not {dims!r}")
    given = dict(dims)
    latent = bool(given.pop("mla", 0))
    head_dim = given.pop("hd", None)
    window = given.pop("swa", None)
    unknown = sorted(set(given) - set(DIMS_KEYS))
    if unknown:
        raise UserError(
            f"dims has unknown keys {', '.join(unknown)}; known are {', '.join(DIMS_KEYS)}, mla, hd and swa"
        )
    keys = {DIMS_KEYS[key]: value for key, value in given.items()}
    if latent:
        keys.setdefault("num_key_value_heads", keys.get("num_attention_heads"))
        keys["q_lora_rank"] = keys.get("q_lora_rank") or None
    else:
        keys.update(qk_nope_head_dim=head_dim, v_head_dim=head_dim)
    if window:
        if not (isinstance(window, list) and len(window) == 2):
            raise UserError(f"dims: swa is {window!r}; write [tokens of the window, share of the layers that slide]")
        keys["sliding_window"], keys["sliding_share"] = window
    try:
        return Architecture(**keys)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "dims"
        raise UserError(f"dims: {where}: {first['msg'].removeprefix('Value error, ')}") from None
