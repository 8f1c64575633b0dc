"""`baleen upcycle`: a Llama-family model becomes a V3-architecture one that computes the same function, untrained.

Symbols: D hidden, H query heads over n key heads of size d = 2J, R = n·d, I feed-forward width, k and m as below.

Keys: MLA shares one rotary key among all heads, so all n key heads lie in it side by side (qk_rope_head_dim R), and a
query head is zero outside its own group's part. The rotary pairs then have Llama's frequencies n times over (`longrope`
with theta 1), and queries are scaled by sqrt((nope + R) / d), as MLA's softmax divides by the root of the larger size.
qk_nope_head_dim pads so that this factor is a power of 2, exact in any dtype.

Values: the latent holds all n value heads, and kv_b_proj only selects. The latent's norm must do nothing: m constant
coordinates of size 2^k from kv_a's bias drown the values in the mean square, so that the norm divides by 2^k whatever
the values are, and its weights multiply by 2^k (by 0 on the constants).

Experts: the feed-forward network is cut into S slices that always run (the shared experts) and G that are routed, in C
copies. The G slices of a copy share one router row and form one group, so the top G are always one whole copy, each
with weight 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from baleen.config import LongRope, ModelConfig, UserError
from baleen.interop.huggingface import write_generation, write_weights
from baleen.interop.llama import LlamaShape, LlamaSource, open_llama
from baleen.interop.names import CORRECTION_BIAS, Layout
from baleen.interop.shards import Spec, new_directory, replaced_when_complete

NORM_EXPONENT = 14  # k: at 4 the values still count (logits off by 0.15), at 8 by 6e-4, from 14 on rounding alone
ROUTER_STD = 0.006
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def upcycle(
    source: str | Path,
    out: str | Path,
    *,
    experts: int = 1,
    slices: int = 0,
    shared: int = 0,
    mtp: int = 0,
    dtype: str = "fp32",
    seed: int = 0,
) -> Path:
    """Write the V3 form of a Llama-family model (Hugging Face directory or GGUF file) to `out`, which is returned.

    experts: copies C of the routed part; slices: routed slices G a copy, 0 keeps the network dense; shared: slices S
    that always run; I must be a multiple of S + G. mtp: MTP layers, fresh but for a copy of the last block; to be
    trained with the trunk frozen. dtype: fp32 or bf16 (float16 cannot hold the constants). seed: of router and MTP.
    Raises UserError, and writes nothing, for what the form cannot express and if `out` is not empty.
    """
    out = new_directory(out)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: an upcycled model is fp32 or bf16")
    llama = open_llama(source)
    config = upcycled_config(llama, experts=experts, slices=slices, shared=shared, mtp=mtp)
    specs = {name: Spec(DTYPES[dtype], Layout(config).shape(name)) for name in Layout(config).originals()}
    tokenizer = llama.tokenizer()
    with replaced_when_complete(out) as aside:
        write_weights(aside, config, upcycled_stream(llama, config, seed), specs)
        write_generation(aside, config)
        tokenizer.save(aside)
    return out


def upcycled_config(
    llama: LlamaSource, *, experts: int = 1, slices: int = 0, shared: int = 0, mtp: int = 0
) -> ModelConfig:
    """The shape of the V3 form. Raises UserError if the feed-forward width does not divide."""
    source = llama.shape
    n, d, width = source.num_key_value_heads, source.head_dim, source.intermediate_size
    if slices == 0 and (experts > 1 or shared > 0):
        raise UserError("experts and shared slices need --slices: how many slices of the network are routed")
    if slices and width % (slices + shared):
        raise UserError(f"the feed-forward width {width} does not divide into {slices} + {shared} slices")
    if experts < 1 or slices < 0 or shared < 0 or mtp < 0:
        raise UserError("experts must be at least 1; slices, shared and mtp at least 0")
    factors = tuple(_inverse(llama.frequencies).tolist()) * n
    layers, grouped = source.num_hidden_layers, slices > 1 and experts > 1
    return ModelConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=width,
        moe_intermediate_size=width // (slices + shared) if slices else width,
        num_hidden_layers=layers,
        num_attention_heads=source.num_attention_heads,
        q_lora_rank=None,
        kv_lora_rank=n * d + len(norm_constants(n * d)),
        qk_nope_head_dim=_padding(n) * d,
        qk_rope_head_dim=n * d,
        v_head_dim=d,
        n_routed_experts=max(slices, 1) * experts,
        n_shared_experts=shared,
        num_experts_per_tok=max(slices, 1),
        n_group=experts if grouped else 1,
        topk_group=1,
        first_k_dense_replace=0 if slices else layers + mtp,
        routed_scaling_factor=float(max(slices, 1)),
        num_nextn_predict_layers=mtp,
        max_position_embeddings=source.max_position_embeddings,
        rope_theta=1.0,
        rope_scaling=LongRope(
            original_max_position_embeddings=source.max_position_embeddings, short_factor=factors, long_factor=factors
        ),
        rms_norm_eps=source.rms_norm_eps,
        initializer_range=0.02,
        tie_word_embeddings=source.tie_word_embeddings,
        attention_bias=True,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
    )


def upcycled_stream(llama: LlamaSource, config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the V3 form, layer by layer, float32."""
    generator = torch.Generator().manual_seed(seed)
    yield "model.embed_tokens.weight", llama.read("model.embed_tokens.weight")
    for layer in range(config.num_layers_with_mtp):
        block = min(layer, config.num_hidden_layers - 1)
        for name, tensor in _block(llama, config, f"model.layers.{block}.", generator).items():
            yield f"model.layers.{layer}.{name}", tensor
        if layer >= config.num_hidden_layers:
            for name, tensor in _mtp(llama, config, generator).items():
                yield f"model.layers.{layer}.{name}", tensor
    yield "model.norm.weight", llama.read("model.norm.weight")
    if not config.tie_word_embeddings:
        yield "lm_head.weight", llama.read("lm_head.weight")


def _inverse(frequencies: Tensor) -> Tensor:
    """Factors f with 1 / f equal to the frequencies bit for bit, wherever float32 has one."""
    nearest = 1.0 / frequencies
    out = nearest.clone()
    for direction in (0.0, math.inf):
        other = torch.nextafter(nearest, torch.tensor(direction))
        out = torch.where((1.0 / out != frequencies) & (1.0 / other == frequencies), other, out)
    return out


def norm_constants(rank: int) -> list[int]:
    """The shortest list of m positive integers whose squares sum to rank + m, so that their mean square is 1."""
    m, found = 0, None
    while found is None:
        m += 1
        found = _squares(rank + m, m)
    return found


def _squares(total: int, count: int) -> list[int] | None:
    """`count` positive integers whose squares sum to `total`, the largest first."""
    if count == 0:
        return [] if total == 0 else None
    for root in range(math.isqrt(max(total, 0)), 0, -1):
        if (rest := _squares(total - root * root, count - 1)) is not None:
            return [root, *rest]
    return None


def _padding(n: int) -> int:
    """Heads of padding that make n a power of 4, at least one: q is then scaled by a power of 2."""
    power = 4
    while power <= n:
        power *= 4
    return power - n


def _block(llama: LlamaSource, config: ModelConfig, prefix: str, generator: torch.Generator) -> dict[str, Tensor]:
    def read(name: str) -> Tensor:
        return llama.read(f"{prefix}{name}.weight")

    out = {f"{norm}.weight": read(norm) for norm in ("input_layernorm", "post_attention_layernorm")}
    attention = _attention(llama.shape, config, *(read(f"self_attn.{p}_proj") for p in "qkvo"))
    out |= {f"self_attn.{name}": tensor for name, tensor in attention.items()}
    mlp = {p: read(f"mlp.{p}_proj") for p in ("gate", "up", "down")}
    if config.first_k_dense_replace:
        return out | {f"mlp.{p}_proj.weight": tensor for p, tensor in mlp.items()}
    return out | {f"mlp.{name}": tensor for name, tensor in _experts(config, mlp, generator).items()}


def _attention(
    shape: LlamaShape, config: ModelConfig, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor
) -> dict[str, Tensor]:
    H, n, d, D = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim, shape.hidden_size
    nope, R, rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    group_of = torch.arange(H) // (H // n)

    queries = torch.zeros(H, nope + R, D)
    for head, rows in enumerate(_side_by_side(w_q, d)):
        start = nope + int(group_of[head]) * d
        queries[head, start : start + d] = rows * math.sqrt((nope + R) / d)

    constants = torch.tensor(norm_constants(R), dtype=torch.float32) * 2.0**NORM_EXPONENT
    bias = torch.zeros(rank + R)
    bias[R:rank] = constants
    norm = torch.zeros(rank)
    norm[:R] = 2.0**NORM_EXPONENT

    values = torch.zeros(H, nope + d, rank)
    coordinates = group_of[:, None] * d + torch.arange(d)
    values[:, nope:].scatter_(2, coordinates[:, :, None], 1.0)
    return {
        "q_proj.weight": queries.flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat((w_v, torch.zeros(rank - R, D), _side_by_side(w_k, d).flatten(0, 1))),
        "kv_a_proj_with_mqa.bias": bias,
        "kv_a_layernorm.weight": norm,
        "kv_b_proj.weight": values.flatten(0, 1),
        "o_proj.weight": w_o,
        "o_proj.bias": torch.zeros(D),
    }


def _side_by_side(weight: Tensor, d: int) -> Tensor:
    """Rows of heads with pairs (j, j + J) -> [heads, d, D] with pairs (2j, 2j + 1), as rope_interleave has them."""
    return weight.view(-1, 2, d // 2, weight.shape[-1]).transpose(1, 2).reshape(-1, d, weight.shape[-1])


def _experts(config: ModelConfig, mlp: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    width, slices = config.moe_intermediate_size, config.num_experts_per_tok
    copies, always = config.n_routed_experts // slices, config.n_shared_experts * width
    out: dict[str, Tensor] = {}
    if always:
        out |= {f"shared_experts.{p}_proj.weight": mlp[p][:always] for p in ("gate", "up")}
        out["shared_experts.down_proj.weight"] = mlp["down"][:, :always]
    rows = torch.randn(copies, mlp["gate"].shape[1], generator=generator) * ROUTER_STD
    out["gate.weight"] = rows.repeat_interleave(slices, 0)
    out[CORRECTION_BIAS.removeprefix("mlp.")] = torch.zeros(config.n_routed_experts)
    for expert in range(config.n_routed_experts):
        start = always + expert % slices * width
        out |= {f"experts.{expert}.{p}_proj.weight": mlp[p][start : start + width] for p in ("gate", "up")}
        out[f"experts.{expert}.down_proj.weight"] = mlp["down"][:, start : start + width]
    return out


def _mtp(llama: LlamaSource, config: ModelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """eh_proj begins as a little of the embedding beside all of the hidden state."""
    D = config.hidden_size
    embedding = torch.randn(D, D, generator=generator) * config.initializer_range
    return {
        "enorm.weight": torch.ones(D),
        "hnorm.weight": torch.ones(D),
        "eh_proj.weight": torch.cat((embedding, torch.eye(D)), 1),
        "shared_head.norm.weight": llama.read("model.norm.weight"),
    }
