"""The dense peer: a plain Llama of transformers, of the same active size or another, and nanoGPT's steps for it."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from baleen.data.loader import Loader
from baleen.model.transformer import Output, Transformer
from baleen.recipe import Recipe
from baleen.train.optimizer import Optimizer
from baleen.train.precision import Precision, computing_in, resolve_precision
from baleen.train.schedule import Schedules
from baleen.train.trainer import Counters


def active_parameters(model: Transformer) -> int:
    """Parameters that one token multiplies, MTP and the input embedding left out."""
    cfg = model.config
    total = sum(p.numel() for layer in model.trunk_layers for p in layer.parameters())
    moe_layers = cfg.num_hidden_layers - min(cfg.first_k_dense_replace, cfg.num_hidden_layers)
    expert = 3 * cfg.hidden_size * cfg.moe_intermediate_size
    return total - moe_layers * (cfg.n_routed_experts - cfg.num_experts_per_tok) * expert + model.lm_head.weight.numel()


class Dense(nn.Module):
    """LlamaForCausalLM behind the little of our Transformer's face that evaluation uses.

    With scale 1 it has `active` parameters beside its embedding; else both its widths are so much larger or smaller.
    """

    def __init__(self, recipe: Recipe, active: int, scale: float = 1.0):
        super().__init__()
        cfg = recipe.model
        d, L, per_head = cfg.hidden_size, cfg.num_hidden_layers, 8 * cfg.num_attention_heads
        width = ((active - cfg.vocab_size * d) / L - 4 * d * d) / (3 * d)
        d, width = round(scale * d / per_head) * per_head, round(scale * width / 8) * 8
        torch.manual_seed(recipe.train.seed)
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=cfg.vocab_size, hidden_size=d, intermediate_size=width, num_hidden_layers=L,
                num_attention_heads=cfg.num_attention_heads, num_key_value_heads=cfg.num_attention_heads,
                max_position_embeddings=cfg.max_position_embeddings, initializer_range=cfg.initializer_range,
                rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
                tie_word_embeddings=False, attn_implementation="sdpa",
            )
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.llama.device

    def forward(self, ids_BT: Tensor) -> Output:
        return Output(self.llama.model(ids_BT, use_cache=False).last_hidden_state, [])

    def logits(self, hidden: Tensor) -> Tensor:
        return self.llama.lm_head(hidden)


class DenseTrainer:
    """The steps of nanoGPT: a compiled model, AdamW (fused) or Muon, clipping, the recipe's schedule and precision."""

    def __init__(self, recipe: Recipe, model: Dense, loader: Loader):
        self.recipe, self.model, self.loader = recipe, model, loader
        self.schedules, self.counters = Schedules(recipe), Counters()
        self.precision: Precision = resolve_precision(recipe.train.precision, torch.device("cpu"))
        self.optimizer = Optimizer(model, recipe.train)
        self._loss = torch.compile(self._eager_loss, dynamic=False, fullgraph=True)
        shape = (self.schedules.batch_sequences(0.0), recipe.train.seq_len + 1)
        self._loss(torch.zeros(shape, dtype=torch.long)).backward()  # compiled here, on no clock

    @property
    def position(self) -> float:
        train = self.recipe.train
        clock = train.tokens * self.counters.wall_seconds / (60 * train.minutes) if train.minutes else 0.0
        return max(self.counters.tokens, clock)

    @property
    def done(self) -> bool:
        return self.position >= self.recipe.train.tokens

    def step(self) -> float:
        """One step; returns the loss in nats a token."""
        started = time.monotonic()
        tokens = self.loader.next_batch(self.schedules.batch_sequences(self.position)).tokens
        loss = self._loss(tokens)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.train.clip_norm)
        self.optimizer.step(self.schedules.lr(self.position))
        self.counters.step += 1
        self.counters.tokens += tokens.shape[0] * (tokens.shape[1] - 1)
        self.counters.seconds += time.monotonic() - started
        return loss.item()

    def _eager_loss(self, tokens: Tensor) -> Tensor:
        with computing_in(self.precision, tokens.device):
            logits = self.model.logits(self.model(tokens[:, :-1]).hidden_BTd)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
