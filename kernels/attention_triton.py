"""Merge of two partial attention results in one pass, and what centring took put back in one.

Shape legend: H heads, T query tokens, D head dim, R rows of a tile.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MERGE_ROWS = 32
RESTORE_ROWS = 64


@triton.jit(do_not_specialize=["num_queries"])
def merge_kernel(
    out_a, lse_a, out_b, lse_b, out, lse,
    stride_ah, stride_at, stride_bh, stride_bt, num_queries,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Weigh ROWS rows of two results of one head by their share of the sum of exponentials."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < num_queries
    column = tl.arange(0, D)[None, :]
    a = tl.load(lse_a + head * num_queries + row, mask=live, other=float("-inf"))
    b = tl.load(lse_b + head * num_queries + row, mask=live, other=float("-inf"))
    top = tl.maximum(a, b)
    shift = tl.where(top == float("-inf"), 0.0, top)
    share_a, share_b = tl.exp(a - shift), tl.exp(b - shift)
    total = share_a + share_b
    tl.store(lse + head * num_queries + row, shift + tl.log(total), mask=live)
    scale = tl.where(total > 0, 1.0 / total, 0.0)
    x = tl.load(out_a + head * stride_ah + row[:, None] * stride_at + column, mask=live[:, None], other=0.0)
    y = tl.load(out_b + head * stride_bh + row[:, None] * stride_bt + column, mask=live[:, None], other=0.0)
    z = x.to(tl.float32) * (share_a * scale)[:, None] + y.to(tl.float32) * (share_b * scale)[:, None]
    place = out + (head * num_queries + row)[:, None] * D + column
    tl.store(place, z.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["num_queries"])
def restore_kernel(
    out, lse, centre, shift, stride_oh, stride_ot, num_queries,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add a head's centre to ROWS rows of its output and their shifts to their log-sum-exps, in place."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < num_queries
    column = tl.arange(0, D)
    line = head * num_queries + row
    moved = tl.load(lse + line, mask=live, other=0.0) + tl.load(shift + line, mask=live, other=0.0)
    tl.store(lse + line, moved, mask=live)
    place = out + head * stride_oh + row.to(tl.int64)[:, None] * stride_ot + column[None, :]
    x = tl.load(place, mask=live[:, None], other=0.0).to(tl.float32) + tl.load(centre + head * D + column)[None, :]
    tl.store(place, x.to(out.dtype.element_ty), mask=live[:, None])


def restore(out_HTD: Tensor, lse_HT: Tensor, centre_HD: Tensor, shift_HT: Tensor) -> None:
    """Add the values' centre to an attention's output and the keys' to its log-sum-exp, in place.

    Args:
        out_HTD: [H, T, D] any float type, D a power of two, channels contiguous.
        lse_HT, shift_HT: float32 [H, T], contiguous.
        centre_HD: float32 [H, D], contiguous.
    """
    num_heads, num_queries, dim = out_HTD.shape
    restore_kernel[(triton.cdiv(num_queries, RESTORE_ROWS), num_heads)](
        out_HTD, lse_HT, centre_HD, shift_HT, out_HTD.stride(0), out_HTD.stride(1), num_queries,
        D=dim, ROWS=RESTORE_ROWS,
    )  # fmt: skip


def merge(out_a_HTD: Tensor, lse_a_HT: Tensor, out_b_HTD: Tensor, lse_b_HT: Tensor) -> tuple[Tensor, Tensor]:
    """Triton twin of attention.merge: D a power of two, channels contiguous; results are contiguous."""
    num_heads, num_queries, dim = out_a_HTD.shape
    dtype = torch.promote_types(out_a_HTD.dtype, out_b_HTD.dtype)
    out_HTD = torch.empty((num_heads, num_queries, dim), dtype=dtype, device=out_a_HTD.device)
    lse_HT = torch.empty((num_heads, num_queries), dtype=torch.float32, device=out_a_HTD.device)
    merge_kernel[(triton.cdiv(num_queries, MERGE_ROWS), num_heads)](
        out_a_HTD, lse_a_HT.contiguous(), out_b_HTD, lse_b_HT.contiguous(), out_HTD, lse_HT,
        out_a_HTD.stride(0), out_a_HTD.stride(1), out_b_HTD.stride(0), out_b_HTD.stride(1), num_queries,
        D=dim, ROWS=MERGE_ROWS,
    )  # fmt: skip
    return out_HTD, lse_HT
