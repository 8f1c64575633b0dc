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
from baleen.eval.acceptance import mtp_acceptance_forced
from baleen.eval.token_loss import token_nats
from baleen.infer.engine import Engine, Request
from baleen.infer.sampler import SamplingParams
from baleen.model.transformer import Transformer

NODES = 4  # that the experts of a layer would be spread over, in blocks: the groups of base.toml
BEFORE = 20  # steps whose median a loss is compared with
SPIKE = 0.5  # nats above it: what counts as a spike
ROWS, PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS, INFILLS = 32, 32, 48, 48, 256
FORCED_TOKENS = 128
INFILL_CHARS = 400  # of a document: prefix, middle and suffix


def largest_jump(losses: Sequence[float | None]) -> float:
    """The most that a step's loss lies above the median of the steps before it, in nats; skipped steps have none."""
    known = [loss for loss in losses if loss is not None]
    jumps = (known[i] - statistics.median(known[i - BEFORE : i]) for i in range(BEFORE, len(known)))
    return max(jumps, default=0.0)


def longest_spike(losses: Sequence[float | None]) -> int:
    """The most steps in a row whose losses lie more than SPIKE above the median of the BEFORE before the first."""
    known = [loss for loss in losses if loss is not None]
    longest = 0
    for i in range(BEFORE, len(known)):
        level = statistics.median(known[i - BEFORE : i]) + SPIKE
        length = next((n for n, loss in enumerate(known[i:]) if loss <= level), len(known) - i)
        longest = max(longest, length)
    return longest


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
    """{acceptance_K: share of the drafts of depth K that greedy decoding keeps, a draft after a refused one counting as
    refused} on held-out beginnings; acceptance_forced: of depth 1 on held-out text, which no loop can inflate."""
    prompts = [
        prepared.tokenizer.encode_chat(document.messages or ())[:PROMPT_TOKENS]
        for document in prepared.heldout[:PROMPTS]
    ]
    depth = model.config.num_nextn_predict_layers
    greedy = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    generation = Engine(model, None).generate([Request(ids, greedy) for ids in prompts], speculate=depth)
    for _ in generation:
        pass
    texts = [prepared.tokenizer.encode_chat(document.messages or ())[:FORCED_TOKENS] for document in prepared.heldout]
    whole = torch.tensor([ids for ids in texts if len(ids) == FORCED_TOKENS])
    found = {f"acceptance_{k}": share for k, share in enumerate(generation.stats.acceptance, 1)}
    return found | {"acceptance_forced": mtp_acceptance_forced(model, whole)}


def middle_bits_per_byte(model: Transformer, prepared: Prepared) -> dict[str, float]:
    """{middle_bpb, infill_bpb, completion_bpb}: bits per byte of the middle third of held-out passages, after their
    first third as anybody reads it, after first and last third in FIM's order, and the lower of the two."""
    tokenizer, size = prepared.tokenizer, 0
    nats = {"middle_bpb": 0.0, "infill_bpb": 0.0}
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    texts = [d.text[:INFILL_CHARS] for d in prepared.heldout if len(d.text) >= INFILL_CHARS][:INFILLS]
    for text in texts:
        third = len(text) // 3
        prefix, middle, suffix = (
            tokenizer.encode(part) for part in (text[:third], text[third : 2 * third], text[2 * third :])
        )
        orders = {"middle_bpb": [*prefix, *middle], "infill_bpb": fim_tokens(prefix, middle, suffix, tokenizer)}
        for name, ids in orders.items():
            nats[name] += float(token_nats(model, [[*bos, *ids]])[0][-len(middle) :].sum())
        size += len(text[third : 2 * third].encode())
    found = {name: total / math.log(2) / max(1, size) for name, total in nats.items()}
    return found | {"completion_bpb": min(found.values())}
