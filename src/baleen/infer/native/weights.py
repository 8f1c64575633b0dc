"""A network's matrices packed for step.cpp: cut into panels, in one of four formats.

fp32 and bf16 hold the weights as they are. int8: 32 weights of an output share a scale, w = scale * q (the blocks of
GGUF's Q8_0, 8.5 bits a weight). int4: w = scale * q + least (those of Q4_1, 5 bits). Scales are bfloat16, rounded up.
Norms, biases, the gate and the embedding stay as they are.

Shapes: d hidden, H heads, N = qk_nope_head_dim, P = qk_rope_head_dim, V = v_head_dim, R = kv_lora_rank, E experts,
F their width, O outputs, I inputs.
"""

from __future__ import annotations

import ctypes
from typing import Literal, get_args

import torch
from torch import Tensor

from baleen.config import UserError
from baleen.infer.native.library import Layer, Library, Matrix, Model, Shape
from baleen.model.attention import LATENT_NORM_EPS
from baleen.model.layer import DecoderLayer
from baleen.model.moe import MLP, DeepseekMoE
from baleen.model.mtp import MTPLayer
from baleen.model.rope import softmax_scale
from baleen.model.transformer import Transformer

Format = Literal["fp32", "bf16", "int8", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)
PANEL, BLOCK = 16, 32


def rounded(weight: Tensor, format: Format) -> Tensor:
    """The weights [..., I] that a packed matrix stands for, float32: the twin of pack.h."""
    weight = weight.float()
    if format == "fp32":
        return weight
    if format == "bf16":
        return weight.bfloat16().float()
    inputs = weight.shape[-1]
    blocks = torch.nn.functional.pad(weight, (0, -inputs % BLOCK)).unflatten(-1, (-1, BLOCK))
    if format == "int8":
        scale = _up(blocks.abs().amax(-1, keepdim=True) / 127)
        quotient = torch.where(scale > 0, 1 / scale, 0.0)
        out = (blocks * quotient).round() * scale
    else:
        real = torch.arange(blocks.shape[-2] * BLOCK, device=weight.device).view(-1, BLOCK) < inputs
        least = blocks.masked_fill(~real, torch.inf).amin(-1, keepdim=True).bfloat16().float()
        most = blocks.masked_fill(~real, -torch.inf).amax(-1, keepdim=True)
        scale = _up((most - least).clamp(min=0) / 15)
        quotient = torch.where(scale > 0, 1 / scale, 0.0)
        out = ((blocks - least) * quotient).round().clamp(0, 15) * scale + least
    return out.flatten(-2)[..., :inputs]


def _up(scale: Tensor) -> Tensor:
    """To bfloat16, upwards: the largest weight stays within reach. Not negative."""
    return ((scale.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


class PackedModel:
    """The struct `Model` of step.h and all memory that it points to."""

    def __init__(self, library: Library, model: Transformer, format: Format, positions: int):
        """positions: the rotary tables reach so far. Raises UserError for a format that there is not."""
        if format not in FORMATS:
            raise UserError(f"weights in {format!r}: take one of {', '.join(FORMATS)}")
        cfg = model.config
        self.config, self.format, self.bytes = cfg, format, 0
        self._library, self._kept = library, []
        cos, sin = model.model.rotary(torch.arange(positions)[None], torch.float32)
        layers = [self._layer(layer) for layer in model.model.layers]  # type: ignore[arg-type]
        self._layers = (Layer * len(layers))(*layers)
        self.struct = Model(
            shape=Shape(
                hidden=cfg.hidden_size, vocab=cfg.vocab_size, trunk_layers=cfg.num_hidden_layers, layers=len(layers),
                heads=cfg.num_attention_heads, q_rank=cfg.q_lora_rank or 0, rank=cfg.kv_lora_rank,
                nope=cfg.qk_nope_head_dim, rope=cfg.qk_rope_head_dim, value=cfg.v_head_dim,
                experts=cfg.n_routed_experts, top_k=cfg.num_experts_per_tok, groups=cfg.n_group,
                top_groups=cfg.topk_group, expert_width=cfg.moe_intermediate_size,
                normalise_gates=cfg.norm_topk_prob, interleave=cfg.rope_interleave,
                gate_scale=cfg.routed_scaling_factor, softmax_scale=softmax_scale(cfg),
                norm_eps=cfg.rms_norm_eps, latent_norm_eps=LATENT_NORM_EPS,
            ),
            layers=ctypes.cast(self._layers, ctypes.c_void_p),
            embedding=self._floats(model.model.embed_tokens.weight),
            norm=self._floats(model.model.norm.weight),
            head=self._matrix(model.lm_head.weight),
            cos=self._floats(cos[0]), sin=self._floats(sin[0]),
        )  # fmt: skip

    def _layer(self, layer: DecoderLayer) -> Layer:
        cfg, attention, out = self.config, layer.self_attn, Layer()
        H, N, V = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.v_head_dim
        out.input_norm = self._floats(layer.input_layernorm.weight)
        out.post_norm = self._floats(layer.post_attention_layernorm.weight)
        out.latent_norm = self._floats(attention.kv_a_layernorm.weight)
        down = [attention.kv_a_proj_with_mqa.weight]
        bias = [attention.kv_a_proj_with_mqa.bias]
        queries = attention.q_proj if cfg.q_lora_rank is None else attention.q_b_proj
        if cfg.q_lora_rank is not None:
            out.q_norm = self._floats(attention.q_a_layernorm.weight)
            down.insert(0, attention.q_a_proj.weight)
            bias.insert(0, attention.q_a_proj.bias)
        out.qkv_a = self._matrix(torch.cat(down), None if bias[0] is None else torch.cat(tuple(bias)))
        out.q_b = self._matrix(queries.weight.unflatten(0, (H, -1)))
        w_uk_HNR, w_uv_HVR = attention.kv_b_proj.weight.unflatten(0, (H, -1)).split([N, V], 1)
        out.w_uk, out.w_uv = self._matrix(w_uk_HNR.transpose(1, 2)), self._matrix(w_uv_HVR)
        out.o = self._matrix(attention.o_proj.weight, attention.o_proj.bias)
        if isinstance(layer.mlp, DeepseekMoE):
            out.router = self._matrix(layer.mlp.gate.weight, format="fp32")
            out.correction = self._floats(layer.mlp.gate.e_score_correction_bias)
            gate_EFd, up_EFd = layer.mlp.experts.gate_up_proj.chunk(2, 1)
            out.gate_up = self._matrix(_alternating(gate_EFd, up_EFd))
            out.down = self._matrix(layer.mlp.experts.down_proj)
        shared = layer.mlp.shared_experts if isinstance(layer.mlp, DeepseekMoE) else layer.mlp
        if isinstance(shared, MLP):
            out.shared_gate_up = self._matrix(_alternating(shared.gate_proj.weight, shared.up_proj.weight))
            out.shared_down = self._matrix(shared.down_proj.weight)
        if isinstance(layer, MTPLayer):
            out.embed_norm, out.hidden_norm = self._floats(layer.enorm.weight), self._floats(layer.hnorm.weight)
            out.head_norm = self._floats(layer.shared_head.norm.weight)
            out.join = self._matrix(layer.eh_proj.weight)
        return out

    def _matrix(self, weight: Tensor, bias: Tensor | None = None, format: Format | None = None) -> Matrix:
        """[O, I], or a stack of such [..., O, I], packed."""
        code = FORMATS.index(format or self.format)
        outputs, inputs = weight.shape[-2:]
        stack = weight.detach().reshape(-1, outputs, inputs)
        size = self._library.matrix_bytes(inputs, outputs, code)
        data = torch.empty(len(stack) * size, dtype=torch.uint8)
        rows = torch.arange(outputs + -outputs % PANEL, dtype=torch.int32)
        rows[outputs:] = -1
        self._library.advise_huge_pages(data)
        for i, matrix_OI in enumerate(stack):
            self._library.pack(matrix_OI.float().contiguous(), rows, code, data[i * size :])
        self._kept.append(data)
        self.bytes += data.numel()
        padded = None if bias is None else torch.nn.functional.pad(bias.detach().float(), (0, -outputs % PANEL))
        return Matrix(
            data=data.data_ptr(), bias=None if padded is None else self._floats(padded),
            inputs=inputs, outputs=outputs, format=code,
        )  # fmt: skip

    def _floats(self, tensor: Tensor) -> int:
        tensor = tensor.detach().float().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _alternating(gate: Tensor, up: Tensor) -> Tensor:
    """[..., F, d] each -> panels of 16 outputs of the one and of the other in turn, [..., 2 * F padded, d]."""
    pad = (0, 0, 0, -gate.shape[-2] % PANEL)
    panels = [torch.nn.functional.pad(m, pad).unflatten(-2, (-1, PANEL)) for m in (gate, up)]
    return torch.stack(panels, -3).flatten(-4, -2)
