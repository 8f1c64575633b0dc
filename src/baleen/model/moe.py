"""DeepSeekMoE: fine-grained routed experts beside shared ones, balanced without auxiliary loss (§2.1.2, Eq. 12-20).

Shapes: N tokens, d hidden, E = n_routed_experts, K = num_experts_per_tok, F = moe_intermediate_size, M = N * K rows
sorted by expert.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from baleen.config import ModelConfig
from baleen.model.fused import swiglu
from baleen.model.linear import Linear, grouped_linear, linear, row_alignment
from baleen.model.rows import combine_rows, spread_rows


class SwiGLU(nn.Module):
    """silu(gate) * up, as a module: what is applied to a model from outside finds it."""

    def forward(self, *gate_up: Tensor) -> Tensor:
        return swiglu(*gate_up)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x), self.up_proj(x)))


class Routing(NamedTuple):
    """The gate's decision for N tokens."""

    indices_NK: Tensor  # chosen experts
    weights_NK: Tensor  # gate values g, float32 or wider
    scores_NE: Tensor  # affinities s, before the correction bias

    def load(self) -> Tensor:
        """Tokens per expert, int64 [E]."""
        flat, E = self.indices_NK.flatten(), self.scores_NE.shape[1]
        if flat.device.type == "cpu":
            return torch.bincount(flat, minlength=E)
        return flat.new_zeros(E).scatter_add_(0, flat, torch.ones_like(flat))  # bincount waits for the GPU


class Gate(nn.Module):
    """Eq. 13-16: s = sigmoid(u · e); the top K are chosen by s + b within the best groups, and weighted by s alone.

    A group's score is the sum of its two best s + b, as in the released code; the paper has the K_r / M best of a node,
    which are two for V3. Experts of the other groups are masked with -inf (0 would be wrong as soon as a bias is
    negative). b, `e_score_correction_bias`, takes no gradient and stays in float32.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def _apply(self, fn, recurse=True):
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if not (bias.is_meta or self.e_score_correction_bias.is_meta):  # the model may be cast, b may not
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x_Nd: Tensor) -> Routing:
        cfg = self.config
        wide = torch.promote_types(x_Nd.dtype, torch.float32)
        with torch.autocast(x_Nd.device.type, enabled=False):
            scores_NE = linear(x_Nd.to(wide), self.weight.to(wide)).sigmoid()
        choice_NE = scores_NE.detach() + self.e_score_correction_bias
        if cfg.n_group > 1:
            grouped = choice_NE.unflatten(-1, (cfg.n_group, -1))
            best_groups = grouped.topk(2, dim=-1).values.sum(-1).topk(cfg.topk_group, dim=-1, sorted=False).indices
            kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best_groups, True)
            choice_NE = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
        indices_NK = choice_NE.topk(cfg.num_experts_per_tok, dim=-1, sorted=False).indices
        weights_NK = scores_NE.gather(-1, indices_NK)
        if cfg.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return Routing(indices_NK, weights_NK * cfg.routed_scaling_factor, scores_NE)

    @torch.no_grad()
    def update_bias(self, load_E: Tensor, speed: float) -> None:
        """b_i += γ · sign(mean load − load_i), with the load of the whole global batch (arXiv 2408.15664)."""
        load = load_E.to(self.e_score_correction_bias.dtype)
        self.e_score_correction_bias += speed * torch.sign(load.mean() - load)


def sequence_balance_loss(routing: Routing, batch_size: int, top_k: int) -> Tensor:
    """Eq. 17-20 without its weight α: Σ_i f_i P_i of each sequence, averaged over the batch.

    f_i counts how often expert i is among the top K by s alone (no bias, no groups), scaled to 1 at perfect balance.
    """
    scores_BTE = routing.scores_NE.unflatten(0, (batch_size, -1))
    T, E = scores_BTE.shape[1:]
    chosen = scores_BTE.detach().topk(top_k, dim=-1, sorted=False).indices
    count_BE = torch.zeros_like(scores_BTE[:, 0]).scatter_add_(
        -1, chosen.flatten(1), torch.ones_like(chosen.flatten(1), dtype=scores_BTE.dtype)
    )
    f_BE = count_BE * E / (top_k * T)
    p_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    return (f_BE * p_BE).sum(-1).mean()


class Experts(nn.Module):
    """All routed experts of a layer, stacked: `gate_up_proj` [E, 2F, d], `down_proj` [E, d, F]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, d, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, d))
        self.down_proj = nn.Parameter(torch.empty(E, d, width))
        self.act_fn = SwiGLU()

    def forward(self, x_Md: Tensor, counts: list[int] | Tensor) -> Tensor:
        """Rows sorted by expert -> the same rows, each through its expert."""
        hidden_MF = self.act_fn(grouped_linear(x_Md, self.gate_up_proj, counts))
        return grouped_linear(hidden_MF, self.down_proj, counts)


class Dispatcher(Protocol):
    """Brings tokens to their experts and results back: the seam at which expert parallelism replaces the local one."""

    def __call__(self, x_Nd: Tensor, routing: Routing, experts: Experts) -> Tensor: ...


def dispatch_locally(x_Nd: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Every expert is here. Drops no token."""
    return apply_experts(x_Nd, routing.indices_NK, routing.weights_NK, routing.load(), experts)


def apply_experts(x_Nd: Tensor, expert_NK: Tensor, weights_NK: Tensor, load_E: Tensor, experts: Experts) -> Tensor:
    """Each token through its K experts, weighted and added up, [N, d]: the N * K pairs run sorted by expert, in groups.

    load_E: pairs of each expert. An expert's rows may be followed by a few that count for nothing, where its matmul
    wants rounded sizes.
    """
    (N, K), align = expert_NK.shape, row_alignment(x_Nd)
    padded_E = (load_E + align - 1) // align * align
    order = expert_NK.flatten().argsort(stable=True)
    shift_E = (padded_E - load_E).cumsum(0) - (padded_E - load_E)  # padding before each expert's rows
    slots = torch.empty_like(order)
    slots[order] = torch.arange(N * K, device=order.device) + shift_E[expert_NK.flatten()[order]]
    on_cpu = x_Nd.device.type == "cpu"
    rows = int(padded_E.sum()) if align > 1 else N * K
    source = order.new_zeros(rows).index_copy_(0, slots, torch.arange(N * K, device=order.device) // K)
    y_Md = experts(spread_rows(x_Nd, source, slots.view(N, K)), padded_E.tolist() if on_cpu else padded_E)
    return combine_rows(y_Md, slots.view(N, K), weights_NK)


class DeepseekMoE(nn.Module):
    """Eq. 12: shared experts on every token plus the gated routed ones."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = (
            MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )
        self.dispatch: Dispatcher = dispatch_locally

    def forward(self, x_BTd: Tensor) -> tuple[Tensor, Routing]:
        x_Nd = x_BTd.flatten(0, -2)
        routing = self.gate(x_Nd)
        y_Nd = self.dispatch(x_Nd, routing, self.experts)
        if self.shared_experts is not None:
            y_Nd = y_Nd + self.shared_experts(x_Nd)
        return y_Nd.view_as(x_BTd), routing
