"""What is measured of a row beside its loss.

Shapes: B sequences, T tokens, N = B * T, K = num_experts_per_tok.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

from baleen.data.fim import fim_tokens
from baleen.data.packing import PackedTokens
from baleen.data.prepare import Prepared
from baleen.eval.token_loss import token_nats
from baleen.infer.engine import Engine, Request
from baleen.infer.sampler import SamplingParams
from baleen.model.transformer import Transformer

NODES = 4  # that the experts of a layer would be spread over, in blocks: the groups of base.toml
BEFORE = 20  # steps whose median a loss is compared with
ROWS, PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS, INFILLS = 32, 32, 48, 48, 256
INFILL_CHARS = 400  # of a document: prefix, middle and suffix


def largest_jump(losses: Sequence[float | None]) -> float:
    """The most that a step's loss lies above the median of the steps before it, in nats; skipped steps have none."""
    known = [loss for loss in losses if loss is not None]
    jumps = (known[i] - statistics.median(known[i - BEFORE : i]) for i in range(BEFORE, len(known)))
    return max(jumps, default=0.0)


@torch.inference_mode()
def groups_reached(model: Transformer, text: PackedTokens) -> float:
    """Nodes that a token's experts lie on, mean over tokens and layers: what all-to-all must reach."""
    tokens_BT = torch.tensor(text.tokens[:ROWS, :-1].astype("int64"), device=model.device)
    per_node = model.config.n_routed_experts // NODES
    reached = [
        torch.zeros(len(routing.indices_NK), NODES, device=model.device)
        .scatter_(1, routing.indices_NK // per_node, 1.0)
        .sum(1)
        .mean()
        .item()
        for routing in model(tokens_BT).routings
    ]
    return statistics.mean(reached)


def second_token_and_on(model: Transformer, prepared: Prepared) -> dict[str, float]:
    """{acceptance_K: share of the drafts of depth K that greedy decoding keeps} on held-out beginnings."""
    prompts = [
        prepared.tokenizer.encode_chat(document.messages or ())[:PROMPT_TOKENS]
        for document in prepared.heldout[:PROMPTS]
    ]
    depth = model.config.num_nextn_predict_layers
    greedy = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    generation = Engine(model, None).generate([Request(ids, greedy) for ids in prompts], speculate=depth)
    for _ in generation:
        pass
    return {f"acceptance_{k}": share for k, share in enumerate(generation.stats.acceptance, 1)}


def infill_bits_per_byte(model: Transformer, prepared: Prepared, window: int) -> float:
    """Bits per byte of the middle third of held-out passages, after prefix and suffix in FIM's order."""
    tokenizer, nats, size = prepared.tokenizer, 0.0, 0
    texts = [d.text[:INFILL_CHARS] for d in prepared.heldout if len(d.text) >= INFILL_CHARS][:INFILLS]
    for text in texts:
        third = len(text) // 3
        parts = [tokenizer.encode(part) for part in (text[:third], text[third : 2 * third], text[2 * third :])]
        ids = fim_tokens(*parts, tokenizer)[-window:]
        nats += float(token_nats(model, [ids])[0][-len(parts[1]) :].sum())
        size += len(text[third : 2 * third].encode())
    return nats / math.log(2) / max(1, size)
