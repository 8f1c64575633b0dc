"""Softmax attention of MLA's naive form: native and causal for training on CPUs, PyTorch's SDPA everywhere else.

Shapes: B sequences, T queries, S keys, H heads, N = qk_nope_head_dim, P = qk_rope_head_dim, V = v_head_dim, X = N + V.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from baleen.model.native.training import call, serves

LONGEST = 32768  # tokens; of V3's heads the native kernel then keeps 170 MB for each thread that has one


class Joined(nn.Module):
    """Queries, keys or values of two parts, side by side as PyTorch's attention reads them; the second may be shared by
    all heads. A module, so that what is applied to a model from outside finds these copies."""

    def forward(self, first_BTHX: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
        second = second.to(dtype).expand(*first_BTHX.shape[:-1], -1)
        return torch.cat((first_BTHX.to(dtype), second), -1)


class Attention(nn.Module):
    """softmax(q k^T scale) v, [B, T, H, V]: queries of two parts, keys of a part of their own and one that heads share.

    kv_BSHX: k_nope and v of each head. mask: bool [B, 1, T, S], True where a query sees a key; None: causal, T = S.
    """

    def __init__(self, scale: float):
        super().__init__()
        self.scale, self.joined = scale, Joined()

    def forward(
        self, q_nope_BTHN: Tensor, q_rope_BTHP: Tensor, kv_BSHX: Tensor, k_rope_BSP: Tensor, mask: Tensor | None
    ) -> Tensor:
        operands = q_nope_BTHN, q_rope_BTHP, kv_BSHX, k_rope_BSP
        short = mask is None and q_nope_BTHN.shape[1] == kv_BSHX.shape[1] <= LONGEST
        if short and all(map(serves, operands)) and q_nope_BTHN.dtype is kv_BSHX.dtype:
            return _CausalAttention.apply(  # type: ignore[return-value]
                q_nope_BTHN, q_rope_BTHP.float(), kv_BSHX, k_rope_BSP.float(), self.scale
            )
        return self.twin(*operands, mask)

    def twin(
        self, q_nope_BTHN: Tensor, q_rope_BTHP: Tensor, kv_BSHX: Tensor, k_rope_BSP: Tensor, mask: Tensor | None
    ) -> Tensor:
        """By PyTorch's own attention."""
        k_nope_BSHN, v_BSHV = kv_BSHX.tensor_split((q_nope_BTHN.shape[-1],), -1)
        dtype, device, width = kv_BSHX.dtype, kv_BSHX.device.type, v_BSHV.shape[-1]
        if device == "cpu":  # where bf16 is slower than fp32
            dtype = torch.promote_types(dtype, torch.float32)
        query_BTHC = self.joined(q_nope_BTHN, q_rope_BTHP, dtype)
        key_BSHC = self.joined(k_nope_BSHN, k_rope_BSP[:, :, None], dtype)
        missing = key_BSHC.shape[-1] - width
        if device == "cpu" and missing > 0:  # the fast path wants values as wide as the keys (3.5 x faster at 48/32)
            v_BSHV = self.joined(v_BSHV, v_BSHV.new_zeros(1, 1, 1, missing), dtype)
        query, key, value = (x.transpose(1, 2) for x in (query_BTHC, key_BSHC, v_BSHV.to(dtype)))
        with torch.autocast(device, enabled=False):
            out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=self.scale)
        return out[..., :width].to(kv_BSHX.dtype).transpose(1, 2)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_nope: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor, scale: float) -> Tensor:
        operands = _rows_contiguous(q_nope, q_rope, kv, k_rope)
        B, H, T, N, P, V = shape = _shape(*operands)
        out, lse = kv.new_empty(B, T, H, V), torch.empty(B, H, T)
        call("attention", (kv.dtype,), *operands, _strides(*operands), out, lse, *shape, scale)
        ctx.save_for_backward(*operands, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTHV: Tensor):  # type: ignore[override]
        *operands, out, lse = ctx.saved_tensors
        B, H, T, N, P, V = shape = _shape(*operands)
        dtype = out.dtype
        grads = (
            torch.empty(B, T, H, N, dtype=dtype), torch.empty(B, T, H, P),
            torch.empty(B, T, H, N + V, dtype=dtype), torch.empty(B, T, H, P),
        )  # fmt: skip
        grad_BTHV = grad_BTHV.contiguous()
        strides = _strides(*operands)
        call("attention_backward", (dtype,), *operands, strides, out, lse, grad_BTHV, *grads, *shape, ctx.scale)
        grad_q_nope, grad_q_rope, grad_kv, grad_k_rope = grads
        return grad_q_nope, grad_q_rope, grad_kv, grad_k_rope.sum(2), None


def _rows_contiguous(*operands: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in operands)


def _shape(q_nope: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor) -> tuple[int, int, int, int, int, int]:
    B, T, H, N = q_nope.shape
    return B, H, T, N, q_rope.shape[-1], kv.shape[-1] - N


def _strides(q_nope: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor) -> Tensor:
    """Of sequence, token and head, for each of the four; k_rope has no heads."""
    return torch.tensor([*q_nope.stride()[:3], *q_rope.stride()[:3], *kv.stride()[:3], *k_rope.stride()[:2], 0])
