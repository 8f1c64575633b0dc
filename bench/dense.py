"""The peer of bench/quality.py: a plain dense Llama of transformers, of the same active size, trained the same way."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from baleen.config import Recipe
from baleen.data.loader import Loader
from baleen.model.transformer import Output, Transformer
from baleen.train.precision import computing_in, resolve_precision
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
    """LlamaForCausalLM behind the little of our Transformer's face that evaluation uses."""

    def __init__(self, recipe: Recipe, active: int):
        super().__init__()
        cfg = recipe.model
        d, L = cfg.hidden_size, cfg.num_hidden_layers
        attention, head = 4 * d * d, cfg.vocab_size * d
        width = round(((active - head) / L - attention) / (3 * d) / 8) * 8
        torch.manual_seed(recipe.train.seed)
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=cfg.vocab_size, hidden_size=d, intermediate_size=width, num_hidden_layers=L,
                num_attention_heads=cfg.num_attention_heads, num_key_value_heads=cfg.num_attention_heads,
                max_position_embeddings=cfg.max_position_embeddings, initializer_range=cfg.initializer_range,
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
    """The steps of nanoGPT: AdamW (fused), clipping, the recipe's own schedule and precision."""

    def __init__(self, recipe: Recipe, model: Dense, loader: Loader):
        self.recipe, self.model, self.loader = recipe, model, loader
        self.schedules, self.counters = Schedules(recipe), Counters()
        self.precision = resolve_precision(recipe.train.precision, torch.device("cpu"))
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        decay = recipe.train.weight_decay
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=recipe.train.lr, betas=recipe.train.betas, fused=True,
        )  # fmt: skip

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
        with computing_in(self.precision, tokens.device):
            logits = self.model.logits(self.model(tokens[:, :-1]).hidden_BTd)
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.train.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedules.lr(self.position)
        self.optimizer.step()
        self.counters.step += 1
        self.counters.tokens += tokens.shape[0] * (tokens.shape[1] - 1)
        self.counters.seconds += time.monotonic() - started
        return loss.item()
