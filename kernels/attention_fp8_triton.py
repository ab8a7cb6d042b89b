"""Attention over FP8 keys and values, with log-sum-exp: the Triton kernels behind attention_fp8.py.

One program takes BM queries of one head past all its keys, BN at a time, in the way of FlashAttention: scores in base
2, a running maximum, P rounded to e4m3 after scaling by 2^8 (e4m3 reaches from 2^-9 to 448, so weights down to 2^-17
of the largest survive). Queries are rounded to e4m3 by a small kernel before, each with its own scale.

Shape legend: H heads, T query tokens, X key tokens, D head dim, BM, BN rows and columns of a tile of scores.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.scaling import Scaling

P_SHIFT = tl.constexpr(8.0)
LN2 = tl.constexpr(0.6931471805599453)
ROWS = 64  # queries of a tile (BM)
COLUMNS = 128  # keys of a step (BN)
WARPS = 4
STAGES = 3  # of the software pipeline
QUERY_ROWS = 32


@triton.jit
def load_rows(x, head, start, num_keys, stride_h, stride_x, D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):
    """Rows start .. start + BN of a head, [BN, D]; channels are contiguous."""
    key = start + tl.arange(0, BN)
    place = x + head.to(tl.int64) * stride_h + key.to(tl.int64)[:, None] * stride_x + tl.arange(0, D)[None, :]
    if MASKED:  # noqa: SIM108
        tile = tl.load(place, mask=(key < num_keys)[:, None], other=0.0)
    else:
        tile = tl.load(place)
    return tile


@triton.jit
def load_turned(x, head, start, num_keys, stride_h, stride_d, D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):
    """Rows start .. start + BN of a head, [BN, D]; tokens are contiguous."""
    key = start + tl.arange(0, BN)
    place = x + head.to(tl.int64) * stride_h + tl.arange(0, D)[:, None] * stride_d + key.to(tl.int64)[None, :]
    if MASKED:  # noqa: SIM108
        tile = tl.load(place, mask=(key < num_keys)[None, :], other=0.0)
    else:
        tile = tl.load(place)
    return tl.trans(tile)


@triton.jit
def quantise_queries_kernel(
    q, k_centre, q8, q_scale, shift, stride_qh, stride_qt, stride_oh, stride_ot, num_queries, softmax_scale,
    D: tl.constexpr, ROWS: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    """ROWS queries of a head to e4m3, and what K's centre takes from their scores; q_scale [H] is given with BY_HEAD,
    otherwise each query gets one, [H, T]."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < num_queries
    column = tl.arange(0, D)
    place = q + head * stride_qh + row.to(tl.int64)[:, None] * stride_qt + column[None, :]
    tile = tl.load(place, mask=live[:, None], other=0.0).to(tl.float32)
    moved = tl.sum(tile * tl.load(k_centre + head * D + column)[None, :], 1) * softmax_scale
    tl.store(shift + head * num_queries + row, moved, mask=live)
    if BY_HEAD:
        tile = tile * (1.0 / tl.load(q_scale + head))
    else:
        largest = tl.max(tl.abs(tile), 1)
        scale = tl.where(largest > 0, largest * (1.0 / 448.0), 1.0)
        tl.store(q_scale + head * num_queries + row, scale, mask=live)
        tile = tile / scale[:, None]
    tile = tl.minimum(tl.maximum(tile, -448.0), 448.0)
    out = q8 + head * stride_oh + row.to(tl.int64)[:, None] * stride_ot + column[None, :]
    tl.store(out, tile.to(tl.float8e4nv), mask=live[:, None])


@triton.jit
def update(acc, top, total, score, scale, v_tile, DOT: tl.constexpr):
    """Take one tile of scores into the running output, maximum and sum. scale is [BM]: of scores, in base 2.

    P.V is added to the output in float32, not inside the tensor core, whose FP8 sums keep about 14 bits.
    """
    new_top = tl.maximum(top, tl.max(score, 1) * scale)
    p = tl.math.exp2(score * scale[:, None] - (new_top - P_SHIFT)[:, None])
    alpha = tl.math.exp2(top - new_top)
    total = total * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None] + tl.dot(p.to(tl.float8e4nv).to(DOT), v_tile.to(DOT))
    return acc, new_top, total


@triton.jit(do_not_specialize=["num_queries", "num_keys"])  # a history grows: one build serves all
def attend_kernel(
    q8, q_scale, shift, k, v, k_scale, v_scale, v_centre, out, lse,
    stride_kh, stride_kx, stride_vh, stride_vd, stride_oh, stride_ot, num_queries, num_keys, softmax_scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of queries past all keys; the last step, where it is not full, is masked: rows not in use may be NaN."""
    tile = tl.program_id(0)
    full_steps = num_keys // BN
    tiles = tl.cdiv(num_queries, BM)
    head = tile // tiles
    row = tile % tiles * BM + tl.arange(0, BM)
    live = row < num_queries
    column = tl.arange(0, D)
    line = head.to(tl.int64) * num_queries + row
    q_tile = tl.load(q8 + line[:, None] * D + column[None, :], mask=live[:, None], other=0.0).to(DOT)
    scale = tl.load(q_scale + line, mask=live, other=1.0)
    scale = scale * (tl.load(k_scale + head) * (softmax_scale * 1.4426950408889634))

    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for i in tl.range(0, full_steps, num_stages=STAGES):
        k_tile = load_rows(k, head, i * BN, num_keys, stride_kh, stride_kx, D, BN, False)
        v_tile = load_turned(v, head, i * BN, num_keys, stride_vh, stride_vd, D, BN, False)
        score = tl.dot(q_tile, tl.trans(k_tile).to(DOT))
        acc, top, total = update(acc, top, total, score, scale, v_tile, DOT)
    if full_steps * BN < num_keys:
        start = full_steps * BN
        k_tile = load_rows(k, head, start, num_keys, stride_kh, stride_kx, D, BN, True)
        v_tile = load_turned(v, head, start, num_keys, stride_vh, stride_vd, D, BN, True)
        score = tl.dot(q_tile, tl.trans(k_tile).to(DOT))
        score = tl.where((start + tl.arange(0, BN) < num_keys)[None, :], score, float("-inf"))
        acc, top, total = update(acc, top, total, score, scale, v_tile, DOT)
    weight = tl.load(v_scale + head) / total
    result = acc * weight[:, None] + tl.load(v_centre + head * D + column)[None, :]
    place = out + head.to(tl.int64) * stride_oh + row.to(tl.int64)[:, None] * stride_ot + column[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=live[:, None])
    result_lse = (top - P_SHIFT + tl.math.log2(total)) * LN2 + tl.load(shift + line, mask=live, other=0.0)
    tl.store(lse + line, result_lse, mask=live)


def quantise_queries(q_HTD: Tensor, scale_H: Tensor, k_centre_HD: Tensor) -> tuple[Tensor, Tensor]:
    """Triton twin of flash3.quantise_reference.

    Args:
        q_HTD: [H, T, D] any float type, D 64 or 128, channels contiguous.
        scale_H: float32 [H], powers of two.
        k_centre_HD: float32 [H, D].

    Returns:
        e4m3 [H, T, D] (a view of [T, H, D]) and the shift, float32 [H, T].
    """
    num_heads, num_queries, dim = q_HTD.shape
    q8_HTD = torch.empty((num_queries, num_heads, dim), dtype=torch.float8_e4m3fn, device=q_HTD.device).transpose(0, 1)
    shift_HT = torch.empty((num_heads, num_queries), dtype=torch.float32, device=q_HTD.device)
    quantise_queries_kernel[(triton.cdiv(num_queries, QUERY_ROWS), num_heads)](
        q_HTD, k_centre_HD, q8_HTD, scale_H, shift_HT, q_HTD.stride(0), q_HTD.stride(1), q8_HTD.stride(0),
        q8_HTD.stride(1), num_queries, dim**-0.5, D=dim, ROWS=QUERY_ROWS, BY_HEAD=True,
    )  # fmt: skip
    return q8_HTD, shift_HT


def attend(
    q_HTD: Tensor, k_HXD: Tensor, v_HXD: Tensor, k_scaling: Scaling, v_scaling: Scaling, num_keys: int
) -> tuple[Tensor, Tensor]:
    """Triton twin of attention_fp8.attend_reference.

    Args:
        q_HTD: [H, T, D] bfloat16, float16 or float32; channels contiguous.
        k_HXD: e4m3 [H, X, D], channels contiguous.
        v_HXD: e4m3 [H, X, D], tokens contiguous.
        k_scaling, v_scaling: what they were stored with.
        num_keys: rows in use, at least 1.

    Returns:
        out_HTD of q's dtype (a view of [T, H, D]), lse_HT float32.
    """
    num_heads, num_queries, dim = q_HTD.shape
    out_HTD = torch.empty((num_queries, num_heads, dim), dtype=q_HTD.dtype, device=q_HTD.device).transpose(0, 1)
    lse_HT = torch.empty((num_heads, num_queries), dtype=torch.float32, device=q_HTD.device)
    dot = tl.float8e4nv if q_HTD.is_cuda else tl.float32  # the interpreter multiplies small types wrongly
    q8_HTD = torch.empty((num_heads, num_queries, dim), dtype=torch.float8_e4m3fn, device=q_HTD.device)
    q_scale_HT, shift_HT = torch.empty_like(lse_HT), torch.empty_like(lse_HT)
    quantise_queries_kernel[(triton.cdiv(num_queries, QUERY_ROWS), num_heads)](
        q_HTD, k_scaling.centre_HD, q8_HTD, q_scale_HT, shift_HT, q_HTD.stride(0), q_HTD.stride(1), q8_HTD.stride(0),
        q8_HTD.stride(1), num_queries, dim**-0.5, D=dim, ROWS=QUERY_ROWS, BY_HEAD=False,
    )  # fmt: skip
    attend_kernel[(num_heads * triton.cdiv(num_queries, ROWS),)](
        q8_HTD, q_scale_HT, shift_HT, k_HXD, v_HXD, k_scaling.scale_H, v_scaling.scale_H, v_scaling.centre_HD, out_HTD,
        lse_HT, k_HXD.stride(0), k_HXD.stride(1), v_HXD.stride(0), v_HXD.stride(2), out_HTD.stride(0),
        out_HTD.stride(1), num_queries, num_keys, dim**-0.5,
        D=dim, BM=ROWS, BN=COLUMNS, DOT=dot, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return out_HTD, lse_HT
