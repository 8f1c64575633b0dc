"""The model card: README.md beside the weights, which says what the model is and what it took."""

from __future__ import annotations

from collections.abc import Sequence

from baleen.config import ModelConfig
from baleen.cost.architecture import from_model_config
from baleen.cost.flops import active_parameters, cache_bytes_per_token, mtp_parameters, parameters


def model_card(
    config: ModelConfig,
    *,
    name: str,
    tokens: int | None = None,
    heldout_bpb: float | None = None,
    sources: Sequence[str] = (),
    cost: str = "",
) -> str:
    """Text of README.md, with the header that model hubs read; what is None or empty is left out.

    tokens: trained on. heldout_bpb: bits per byte of held-out text. sources: of the training text. cost: a paragraph.
    """
    arch = from_model_config(config)
    rows = [
        ("Parameters", f"{parameters(arch)['total']:,}"),
        ("of these active per token", f"{active_parameters(arch):,}"),
        ("Layers", f"{config.num_hidden_layers}, the first {config.first_k_dense_replace} of them dense"),
        ("Hidden size, heads", f"{config.hidden_size}, {config.num_attention_heads}"),
        (
            "Experts",
            f"{config.n_routed_experts} routed, {config.num_experts_per_tok} active, {config.n_shared_experts} shared",
        ),
        ("Latent cache", f"{cache_bytes_per_token(arch):,.0f} bytes per token in 16 bits"),
        ("Vocabulary, context", f"{config.vocab_size:,}, {config.max_position_embeddings:,}"),
    ]
    if config.num_nextn_predict_layers:
        rows.append(("MTP layers", f"{config.num_nextn_predict_layers}, {mtp_parameters(arch):,} parameters more"))
    if tokens is not None:
        rows.append(("Tokens trained on", f"{tokens:,}"))
    if heldout_bpb is not None:
        rows.append(("Held-out bits per byte", f"{heldout_bpb:.4f}"))
    if sources:
        rows.append(("Text", ", ".join(sources)))
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [deepseek_v3, baleen]
---
# {name}

A language model of the DeepSeek-V3 architecture (multi-head latent attention, DeepSeekMoE, multi-token prediction),
made with Baleen. transformers loads it with `AutoModelForCausalLM.from_pretrained`.

| | |
|---|---|
{table}
""" + (f"\n## What it cost\n\n{cost}\n" if cost else "")
