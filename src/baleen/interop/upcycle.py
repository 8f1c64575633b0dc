"""`baleen upcycle`: a Llama-family model becomes a V3-architecture one that computes the same function, untrained.

Symbols: D hidden, H query heads over n key heads of size d = 2J, R = n·d, I feed-forward width, k and m as below.

Keys: MLA shares one rotary key among all heads, so all n key heads lie in it side by side (qk_rope_head_dim R), and a
query head is zero outside its own group's part. The rotary pairs then have Llama's frequencies n times over (`longrope`
with theta 1), and queries are scaled by sqrt((nope + R) / d), as MLA's softmax divides by the root of the larger size.
qk_nope_head_dim pads so that this factor is a power of 2, exact in any dtype.

Values: the latent holds all n value heads, and kv_b_proj only selects. The latent's norm must do nothing: m constant
coordinates of size 2^k from kv_a's bias drown the values in the mean square, so that the norm divides by 2^k whatever
the values are, and its weights multiply by 2^k (by 0 on the constants).

Not exact, on request, with statistics of text (`calibration`): fewer value coordinates than n·d, and the *portable*
form with plain rope and no biases, for engines that know only those (`latent`).

Experts: the feed-forward network is cut into S slices that always run (the shared experts) and G that are routed, in C
copies. The G slices of a copy share one router row and form one group, so the top G are always one whole copy, each
with weight 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from baleen.config import ModelConfig, UserError, validated
from baleen.interop.calibration import calibrate
from baleen.interop.huggingface import LICENCES, copy_companions, model_from_stream, write_generation, write_weights
from baleen.interop.latent import (
    EXACT,
    Form,
    Projections,
    compressed_attention,
    exact_attention,
    norm_constants,
    padding,
    plain_theta,
    wide_attention,
)
from baleen.interop.llama import LlamaSource, open_llama
from baleen.interop.names import CORRECTION_BIAS, Layout
from baleen.interop.shards import Spec, new_directory, replaced_when_complete

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
    portable: bool = False,
    value_rank: int | None = None,
    dtype: str = "fp32",
    seed: int = 0,
    generation: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write the V3 form of a Llama-family model (Hugging Face directory or GGUF file) to `out`, which is returned.

    experts: copies C of the routed part; slices: routed slices G a copy, 0 keeps the network dense; shared: slices S
    that always run; I must be a multiple of S + G. mtp: MTP layers, fresh but for a copy of the last block; to be
    trained with the trunk frozen. portable: plain rope and no biases, nearly the same function; value_rank: coordinates
    of the values in the latent, fewer than n·d for a smaller cache and a little loss. dtype: fp32 or bf16 (float16
    cannot hold the constants). seed: of router and MTP. generation: further keys of generation_config.json.
    Raises UserError, and writes nothing, for what the form cannot express and if `out` is not empty.
    """
    out = new_directory(out)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: an upcycled model is fp32 or bf16")
    llama = open_llama(source)
    form = Form(portable, value_rank)
    config = upcycled_config(llama, experts=experts, slices=slices, shared=shared, mtp=mtp, form=form)
    layout = Layout(config)
    specs = {name: Spec(DTYPES[dtype], layout.shape(name)) for name in layout.originals()}
    tokenizer = llama.tokenizer()
    with replaced_when_complete(out) as aside:
        write_weights(aside, config, upcycled_stream(llama, config, seed, _attentions(llama, form)), specs)
        write_generation(aside, config, {**llama.generation, **generation})
        copy_companions(Path(source), aside, LICENCES)
        tokenizer.save(aside)
    return out


def upcycled_config(
    llama: LlamaSource,
    *,
    experts: int = 1,
    slices: int = 0,
    shared: int = 0,
    mtp: int = 0,
    form: Form = EXACT,
) -> ModelConfig:
    """The shape of the V3 form.

    Raises UserError if the feed-forward width does not divide, for a wrong rank, and for what no V3 model can have.
    """
    source = llama.shape
    n, d, width = source.num_key_value_heads, source.head_dim, source.intermediate_size
    if slices == 0 and (experts > 1 or shared > 0):
        raise UserError("experts and shared slices need --slices: how many slices of the network are routed")
    if slices and width % (slices + shared):
        raise UserError(f"the feed-forward width {width} does not divide into {slices} + {shared} slices")
    if experts < 1 or slices < 0 or shared < 0 or mtp < 0:
        raise UserError("experts must be at least 1; slices, shared and mtp at least 0")
    rank = n * d if form.value_rank is None else form.value_rank
    if not 1 <= rank <= n * d:
        raise UserError(f"value rank {rank}: the source has {n * d} coordinates of values; take 1 to {n * d}")
    constants = 1 if form.portable else len(norm_constants(rank))
    factors = tuple(_inverse(llama.frequencies).tolist()) * n
    own = {
        "rope_type": "longrope",
        "original_max_position_embeddings": source.max_position_embeddings,
        "short_factor": factors,
        "long_factor": factors,
    }
    layers, grouped = source.num_hidden_layers, slices > 1 and experts > 1
    shape = dict(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=width,
        moe_intermediate_size=width // (slices + shared) if slices else width,
        num_hidden_layers=layers,
        num_attention_heads=source.num_attention_heads,
        q_lora_rank=None,
        kv_lora_rank=rank + constants,
        qk_nope_head_dim=padding(n) * d,
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
        rope_theta=plain_theta(llama.frequencies) if form.portable else 1.0,
        rope_scaling=None if form.portable else own,
        rms_norm_eps=source.rms_norm_eps,
        initializer_range=0.02,
        tie_word_embeddings=source.tie_word_embeddings,
        attention_bias=not form.portable,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
    )
    return validated(ModelConfig, shape, "the V3 form of the source")


Attention = Callable[[int, ModelConfig, Projections], dict[str, Tensor]]  # of a layer, by name within it


def upcycled_stream(
    llama: LlamaSource, config: ModelConfig, seed: int, attention: Attention | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the V3 form, layer by layer, float32; `attention` makes another than the exact one."""
    attention = attention or (lambda layer, config, source: exact_attention(llama.shape, config, source))
    generator = torch.Generator().manual_seed(seed)
    yield "model.embed_tokens.weight", llama.read("model.embed_tokens.weight")
    for layer in range(config.num_layers_with_mtp):
        block = min(layer, config.num_hidden_layers - 1)
        for name, tensor in _block(llama, config, block, attention, generator).items():
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


def _block(
    llama: LlamaSource, config: ModelConfig, layer: int, attention: Attention, generator: torch.Generator
) -> dict[str, Tensor]:
    def read(name: str) -> Tensor:
        return llama.read(f"model.layers.{layer}.{name}.weight")

    out = {f"{norm}.weight": read(norm) for norm in ("input_layernorm", "post_attention_layernorm")}
    made = attention(layer, config, Projections(*(read(f"self_attn.{p}_proj") for p in "qkvo")))
    out |= {f"self_attn.{name}": tensor for name, tensor in made.items()}
    mlp = {p: read(f"mlp.{p}_proj") for p in ("gate", "up", "down")}
    if config.first_k_dense_replace:
        return out | {f"mlp.{p}_proj.weight": tensor for p, tensor in mlp.items()}
    return out | {f"mlp.{name}": tensor for name, tensor in _experts(config, mlp, generator).items()}


def _attentions(llama: LlamaSource, form: Form) -> Attention | None:
    """None for the exact form, else with statistics of text."""
    if form == EXACT:
        return None
    config = upcycled_config(llama)
    config = config.model_copy(update={"v_head_dim": llama.shape.num_key_value_heads * config.v_head_dim})
    stream = upcycled_stream(llama, config, 0, lambda _, config, source: wide_attention(llama.shape, config, source))
    moments = calibrate(model_from_stream(config, stream, torch.float32).eval(), llama)
    return lambda layer, config, source: compressed_attention(llama.shape, config, source, moments[layer], form)


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
