"""Grouped-query attention as MLA: the tensors of one attention layer, exact or nearly so.

Symbols as in `upcycle`: D hidden, H query heads over n key heads of size d = 2J, R = n·d, k the norm's exponent, r
coordinates of the values in the latent (R, or fewer).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from baleen.config import ModelConfig, UserError
from baleen.interop.calibration import Moments
from baleen.interop.llama import LlamaShape, plain_frequencies

NORM_EXPONENT = 14  # k: at 4 the values still count (logits off by 0.15), at 8 by 6e-4, from 14 on rounding alone
PORTABLE_NORM_EXPONENT = 8  # a fitted row is many times its constant, and q8_0 keeps its blocks' scales in float16
RIDGE = 1e-6  # of the mean of a matrix's diagonal, where one is inverted


class Form(NamedTuple):
    portable: bool = False  # plain rope and no biases
    value_rank: int | None = None  # r; None: R


EXACT = Form()


class Projections(NamedTuple):
    """Of the source: rotary pair j of a head is rows (j, j + J)."""

    q: Tensor  # [H * d, D]
    k: Tensor  # [R, D]
    v: Tensor  # [R, D]
    o: Tensor  # [D, H * d]


class Basis(NamedTuple):
    """Values v, [R], as r coordinates: v is nearly decode @ encode @ v + rest."""

    encode: Tensor  # [r, R]
    decode: Tensor  # [R, r]
    rest: Tensor  # [R], of the mean


def norm_constants(rank: int) -> list[int]:
    """The shortest list of m positive integers whose squares sum to rank + m, so that their mean square is 1."""
    m, found = 0, None
    while found is None:
        m += 1
        found = _squares(rank + m, m)
    return found


def _squares(total: int, count: int) -> list[int] | None:
    """`count` positive integers whose squares sum to `total`, the largest first."""
    if count == 0:
        return [] if total == 0 else None
    for root in range(math.isqrt(max(total, 0)), 0, -1):
        if (rest := _squares(total - root * root, count - 1)) is not None:
            return [root, *rest]
    return None


def padding(n: int) -> int:
    """Heads of padding that make n a power of 4, at least one: q is then scaled by a power of 2."""
    power = 4
    while power <= n:
        power *= 4
    return power - n


def exact_attention(shape: LlamaShape, config: ModelConfig, source: Projections) -> dict[str, Tensor]:
    """The same function."""
    R = shape.num_key_value_heads * shape.head_dim
    whole = Basis(torch.eye(R), torch.eye(R), torch.zeros(R))
    keys = _side_by_side(source.k, shape.head_dim).flatten(0, 1)
    return _tensors(shape, config, source, whole, _own_group(shape, source.q), keys, None)


def wide_attention(shape: LlamaShape, config: ModelConfig, source: Projections) -> dict[str, Tensor]:
    """The same function, of a config whose v_head_dim is R: every head hands on the values of all, and o_proj reads its
    own group's of them."""
    H, n, d = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    out = exact_attention(shape, config.model_copy(update={"v_head_dim": d}), source)
    values = torch.zeros(H, config.qk_nope_head_dim + n * d, config.kv_lora_rank)
    values[:, config.qk_nope_head_dim :, : n * d] = torch.eye(n * d)
    reads = torch.zeros(shape.hidden_size, H, n, d)
    reads[:, torch.arange(H), torch.arange(H) // (H // n)] = source.o.unflatten(1, (H, d))
    return out | {"kv_b_proj.weight": values.flatten(0, 1), "o_proj.weight": reads.flatten(1)}


def compressed_attention(
    shape: LlamaShape, config: ModelConfig, source: Projections, moments: Moments, form: Form
) -> dict[str, Tensor]:
    """Nearly the same function, on text like that of `moments`.

    Fewer coordinates of values: the eigenvectors of M^1/2 C M^1/2, where C is the covariance of the attention-averaged
    values and M = W_O^T W_O of their heads; the mean goes into o_proj's bias where there is one.
    """
    basis = _value_basis(shape, source.o, moments, form)
    if not form.portable:
        keys = _side_by_side(source.k, shape.head_dim).flatten(0, 1)
        return _tensors(shape, config, source, basis, _own_group(shape, source.q), keys, None)
    queries, keys = _plain_rope(shape, source, moments)
    return _tensors(shape, config, source, basis, queries, keys, _one(moments))


def _tensors(
    shape: LlamaShape,
    config: ModelConfig,
    source: Projections,
    basis: Basis,
    queries: Tensor,
    keys: Tensor,
    one: Tensor | None,
) -> dict[str, Tensor]:
    """queries [H, R, D], keys [R, D]: rotary rows, pairs side by side. one [D]: w with w·x ≈ 1, where the constant that
    drowns the values in the norm's mean square cannot come from a bias."""
    H, n, d, D = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim, shape.hidden_size
    nope, R, rank, r = config.qk_nope_head_dim, n * d, config.kv_lora_rank, len(basis.encode)
    scale = 2.0 ** (NORM_EXPONENT if one is None else PORTABLE_NORM_EXPONENT)
    padded = torch.zeros(H, nope + R, D)
    padded[:, nope:] = queries * math.sqrt((nope + R) / d)

    constant_rows = torch.zeros(rank - r, D) if one is None else (scale * math.sqrt(rank) * one)[None]
    norm = torch.zeros(rank)
    norm[:r] = scale
    values = torch.zeros(H, nope + d, rank)
    values[:, nope:, :r] = basis.decode.view(n, d, r).repeat_interleave(H // n, 0)
    out = {
        "q_proj.weight": padded.flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat((basis.encode @ source.v, constant_rows, keys)),
        "kv_a_layernorm.weight": norm,
        "kv_b_proj.weight": values.flatten(0, 1),
        "o_proj.weight": source.o,
    }
    if config.attention_bias:
        bias = torch.zeros(rank + R)
        bias[r:rank] = torch.tensor(norm_constants(r), dtype=torch.float32) * scale
        rest = basis.rest.view(n, d).repeat_interleave(H // n, 0).flatten()
        out |= {"kv_a_proj_with_mqa.bias": bias, "o_proj.bias": source.o @ rest}
    return out


def _own_group(shape: LlamaShape, w_q: Tensor) -> Tensor:
    """[H, R, D]: each query head at its own group's place among the keys, zero elsewhere."""
    H, n, d = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    out = torch.zeros(H, n, d, shape.hidden_size)
    out[torch.arange(H), torch.arange(H) // (H // n)] = _side_by_side(w_q, d)
    return out.flatten(1, 2)


def _side_by_side(weight: Tensor, d: int) -> Tensor:
    """Rows of heads with pairs (j, j + J) -> [heads, d, D] with pairs (2j, 2j + 1), as rope_interleave has them."""
    return weight.view(-1, 2, d // 2, weight.shape[-1]).transpose(1, 2).reshape(-1, d, weight.shape[-1])


def _value_basis(shape: LlamaShape, w_o: Tensor, moments: Moments, form: Form) -> Basis:
    n, d = shape.num_key_value_heads, shape.head_dim
    R = n * d
    r = R if form.value_rank is None else form.value_rank
    if r == R:
        return Basis(torch.eye(R), torch.eye(R), torch.zeros(R))
    mean = torch.zeros_like(moments.value_mean_R) if form.portable else moments.value_mean_R
    covariance = moments.value_second_RR - torch.outer(mean, mean)
    o_HdD = w_o.double().t().unflatten(0, (n, -1, d))  # [n, heads of a group, d, D]
    weight = torch.block_diag(*torch.einsum("ghdx,ghex->gde", o_HdD, o_HdD))
    root, inverse = _roots(weight)
    basis = torch.linalg.eigh(root @ covariance @ root).eigenvectors[:, -r:]
    encode, decode = basis.t() @ root, inverse @ basis
    return Basis(encode.float(), decode.float(), (mean - decode @ (encode @ mean)).float())


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a positive matrix and its inverse."""
    values, vectors = torch.linalg.eigh(_ridged(matrix))
    return vectors @ torch.diag(values.sqrt()) @ vectors.t(), vectors @ torch.diag(values.rsqrt()) @ vectors.t()


def _ridged(matrix: Tensor) -> Tensor:
    return matrix + RIDGE * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def _one(moments: Moments) -> Tensor:
    """w [D] of the least squares fit w·x ≈ 1."""
    return torch.linalg.solve(_ridged(moments.input_second_DD), moments.input_mean_D).float()


def _plain_rope(shape: LlamaShape, source: Projections, moments: Moments) -> tuple[Tensor, Tensor]:
    """(queries [H, R, D], keys [R, D]) for one plain rope over R, whose pair n·j + m turns as the source's pair j does
    for m = 0, and a little slower for the others.

    Rotation commutes with any complex map of the n keys of a frequency among each other, so their largest principal
    component, weighted by how large the queries are, is brought to m = 0, and least is left to the others.
    """
    H, n, d, D = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim, shape.hidden_size
    second = moments.input_second_DD.to(torch.complex128)
    k_gjD, q_hjD = (_as_complex(w, d) for w in (source.k, source.q))
    of_group = q_hjD.unflatten(0, (n, -1))
    size_gj = torch.einsum("ghjx,xy,ghjy->gj", of_group, second, of_group.conj()).real.clamp(min=1e-30).sqrt()
    keys, queries = torch.zeros(d // 2, n, D, dtype=torch.complex128), torch.zeros(H, d // 2, n, D).to(second)
    for j in range(d // 2):
        weighted = size_gj[:, j, None] * k_gjD[:, j]
        _, vectors = torch.linalg.eigh(weighted @ second @ weighted.conj().t())
        vectors = vectors.flip(-1)  # the largest first
        keys[j] = vectors.conj().t() @ weighted
        back_gm = (vectors / size_gj[:, j, None]).conj()
        queries[:, j] = back_gm.repeat_interleave(H // n, 0)[:, :, None] * q_hjD[:, j, None]
    return _as_pairs(queries.flatten(1, 2)), _as_pairs(keys.flatten(0, 1))


def _as_complex(weight: Tensor, d: int) -> Tensor:
    """Rows of heads with pairs (j, j + J) -> [heads, J, D] complex."""
    pairs = weight.double().unflatten(0, (-1, 2, d // 2))
    return torch.complex(pairs[:, 0], pairs[:, 1])


def _as_pairs(rows: Tensor) -> Tensor:
    """[..., P, D] complex -> [..., 2P, D] with real and imaginary part side by side."""
    return torch.stack((rows.real, rows.imag), -2).flatten(-3, -2).float()


def plain_theta(frequencies: Tensor) -> float:
    """The theta of plain rope. Raises UserError if the frequencies are no plain rope's."""
    d = 2 * len(frequencies)
    theta = 10000.0 if d == 2 else float(f"{float(frequencies[1].double() ** (-d / 2)):.5g}")
    if not torch.allclose(plain_frequencies(theta, d), frequencies, rtol=1e-4):
        raise UserError("the portable form has plain rope, which a source with scaled frequencies cannot take")
    return theta
