"""Queries to FP8 for FlashAttention-3: the Triton kernel behind flash3.py.

Shape legend: H heads, T query tokens, D head dim.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERY_ROWS = 32


@triton.jit
def quantise_kernel(
    q, scale, k_centre, q8, shift, stride_qh, stride_qt, stride_oh, stride_ot, num_queries, softmax_scale,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS queries of a head to e4m3 by the head's scale, and what K's centre takes from their scores."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < num_queries
    column = tl.arange(0, D)
    place = q + head * stride_qh + row.to(tl.int64)[:, None] * stride_qt + column[None, :]
    tile = tl.load(place, mask=live[:, None], other=0.0).to(tl.float32)
    moved = tl.sum(tile * tl.load(k_centre + head * D + column)[None, :], 1) * softmax_scale
    tl.store(shift + head * num_queries + row, moved, mask=live)
    tile = tile * (1.0 / tl.load(scale + head))
    tile = tl.minimum(tl.maximum(tile, -448.0), 448.0)
    out = q8 + head * stride_oh + row.to(tl.int64)[:, None] * stride_ot + column[None, :]
    tl.store(out, tile.to(tl.float8e4nv), mask=live[:, None])


def quantise(q_HTD: Tensor, scale_H: Tensor, k_centre_HD: Tensor) -> tuple[Tensor, Tensor]:
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
    quantise_kernel[(triton.cdiv(num_queries, QUERY_ROWS), num_heads)](
        q_HTD, scale_H, k_centre_HD, q8_HTD, shift_HT, q_HTD.stride(0), q_HTD.stride(1), q8_HTD.stride(0),
        q8_HTD.stride(1), num_queries, dim**-0.5, D=dim, ROWS=QUERY_ROWS,
    )  # fmt: skip
    return q8_HTD, shift_HT
