"""One point of growth.py: reads it as JSON on stdin, prints what was measured and what theory counts.

{seconds (a token; in training without the optimizer), optimizer_seconds, bytes, theory: {seconds, bytes}}, where
theory's seconds are FLOPs (training) or bytes read (decoding) a token. Bytes: what the process grew by in training, its
cache in decoding. path: native or pytorch.
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

import torch
from contenders import PAGE, network
from rounds import seconds
from train import Contender

from baleen.config import ModelConfig
from baleen.cost.architecture import from_model_config
from baleen.cost.flops import cache_bytes_per_token, matmul_parameters, training_flops
from baleen.cost.layout import Layout
from baleen.cost.memory import rank_memory
from baleen.infer.native.runner import NativeRunner, fastest_runner
from baleen.model.cache import Batch, LatentPages
from baleen.model.native.training import kernels
from baleen.model.sdpa import LONGEST
from baleen.train.loss import training_loss
from baleen.train.precision import Precision, keep_freed_memory
from baleen.train.probe import process_bytes


def train(precision: Precision, batch: int, length: int, steps: int, model: dict[str, int]) -> dict[str, Any]:
    keep_freed_memory()  # not in decoding, whose cache would lie in what packing has freed
    before = known_bytes("VmRSS")
    net = network("S", **model, max_position_embeddings=length).train()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return training_loss(net, ids, mtp_loss_weight=0.0, balance_loss_weight=0.0).total

    contender = Contender("baleen", net, loss, precision)
    generator = torch.Generator().manual_seed(1)
    for ids in torch.randint(net.config.vocab_size, (steps + 1, batch, length + 1), generator=generator):
        contender.step(ids)
    updates, whole, tokens = contender.optimizer_steps[1:], contender.steps[1:], batch * length
    arch = from_model_config(net.config)
    kept = "autocast" if precision == "bf16" else precision
    path = "pytorch" if kernels() == "pytorch" else "native" if length <= LONGEST else "native, attention PyTorch's"
    layout = Layout(devices=1, zero=0, recompute="none", micro_batch=batch)
    memory = rank_memory(arch, layout, seq_len=length, micro_batches=1, precision=kept)
    return {
        "seconds": statistics.median(a - b for a, b in zip(whole, updates, strict=True)) / tokens,
        "optimizer_seconds": statistics.median(updates) / tokens,
        "bytes": known_bytes("VmHWM") - before,
        "path": path,
        "theory": {"seconds": training_flops(arch, length), "bytes": memory.total},
    }


@torch.inference_mode()
def decode(batch: int, length: int, steps: int, model: dict[str, int]) -> dict[str, Any]:
    net = network("S", **model, max_position_embeddings=length + steps + 2)
    each = -(-(length + steps + 2) // PAGE)
    runner = fastest_runner(net, LatentPages(net.config, 1))
    before = known_bytes("VmRSS")
    runner.pages = pages = LatentPages(net.config, batch * each, page_size=PAGE)
    pages.latents.normal_(generator=torch.Generator().manual_seed(2))
    tables = [range(b * each, (b + 1) * each) for b in range(batch)]
    tokens = torch.randint(net.config.vocab_size, (steps + 2, batch), generator=torch.Generator().manual_seed(1))

    def step(i: int) -> None:
        at = Batch(tokens[i].tolist(), [length + i] * batch, [1] * batch, tables)
        runner.logits(runner.forward(at).hidden_Nd).argmax(-1).tolist()

    took = [seconds(lambda i=i: step(i)) for i in range(steps + 2)][2:]
    return {
        "seconds": statistics.median(took) / batch,
        "bytes": known_bytes("VmRSS") - before,
        "path": "native" if isinstance(runner, NativeRunner) else "pytorch",
        "theory": {
            "seconds": bytes_read(net.config, batch, length) / batch,
            "bytes": batch * length * cache_bytes_per_token(from_model_config(net.config), 4),
        },
    }


def known_bytes(field: str) -> int:
    found = process_bytes(field)
    assert found is not None, "the system does not tell what a process takes: run it on Linux"
    return found


def bytes_read(cfg: ModelConfig, batch: int, context: int) -> float:
    """By one step in fp32: every weight in use once, experts that several tokens share among them, and the cache."""
    arch, expert = from_model_config(cfg), 3 * cfg.hidden_size * cfg.moe_intermediate_size
    missed = (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** batch
    experts = cfg.n_routed_experts * (1 - missed) - cfg.num_experts_per_tok  # beyond those of one token
    weights = matmul_parameters(arch) + arch.moe_layers * experts * expert
    return 4 * weights + batch * context * cache_bytes_per_token(arch, 4)


if __name__ == "__main__":
    point = json.load(sys.stdin)
    asked = {key: point[key] for key in ("batch", "length", "steps", "model")}
    print(json.dumps(decode(**asked) if point["work"] == "decode" else train(point["precision"], **asked)))
