"""RoPE in Triton: the piece shared by every materialise kernel, and the plain rotation of queries and keys.

Shape legend: T tokens of a block, H heads, D head dim, R rows of a tile.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.arena_triton import DEFAULT_LAUNCH, Launch
from longtake.kernels.rotary import Rotary


@triton.jit
def turns(
    temporal, spatial, frame_R, place_R, live_R, D: tl.constexpr, PT: tl.constexpr, ROWS: tl.constexpr,
    first, C: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of a tile's tokens, each [ROWS, C/2], from the two small tables: of C channels from `first`.

    A row of the tile is [PT pairs of the temporal row | D/2 - PT pairs of the spatial row], read as interleaved floats:
    both borders are multiples of 16 bytes at D = 64 and 128, so every load is 16 bytes wide.
    """
    column = first + tl.arange(0, C)[None, :]
    time = temporal + frame_R[:, None] * (2 * PT) + column
    space = spatial + place_R[:, None] * (D - 2 * PT) + (column - 2 * PT)
    both = tl.load(tl.where(column < 2 * PT, time, space), mask=live_R[:, None], other=0.0)
    return tl.split(tl.reshape(both, (ROWS, C // 2, 2)))


@triton.jit
def rotate_kernel(
    x, y, temporal, spatial, out, x_stride_t, x_stride_h, y_stride_t, y_stride_h, tokens, tokens_per_frame, num_heads,
    D: tl.constexpr, PT: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Turn x, and on the grid's second layer y, [T, H, D] (any strides but the last) into out [2, T, H, D]."""
    stride_t, stride_h = x_stride_t, x_stride_h
    if tl.program_id(2) == 1:
        x = y
        stride_t, stride_h = y_stride_t, y_stride_h
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tokens
    cos, sin = turns(temporal, spatial, row // tokens_per_frame, row % tokens_per_frame, live, D, PT, ROWS, 0, D)
    column = tl.arange(0, D)[None, :]
    line = tl.program_id(2).to(tl.int64) * tokens + row
    for i in range(HEADS):
        head = tl.program_id(1) * HEADS + i
        tile = tl.load(
            x + row.to(tl.int64)[:, None] * stride_t + head * stride_h + column, mask=live[:, None], other=0.0
        )
        real, imag = tl.split(tl.reshape(tile.to(tl.float32), (ROWS, D // 2, 2)))
        turned = tl.reshape(tl.join(real * cos - imag * sin, real * sin + imag * cos), (ROWS, D))
        place = out + (line[:, None] * num_heads + head) * D + column
        tl.store(place, turned.to(out.dtype.element_ty), mask=live[:, None])


def rotate(x_THD: Tensor, rotary: Rotary, y_THD: Tensor | None = None, launch: Launch = DEFAULT_LAUNCH) -> Tensor:
    """Triton twin of `apply_rotary` for one sequence, or for two of the same positions in one launch.

    Args:
        x_THD: [T, H, D], D 64 or 128, last dim contiguous.
        rotary: contiguous tables of exactly those T tokens.
        y_THD: another of the same shape and dtype.
        launch: tile sizes.

    Returns:
        [1 or 2, T, H, D] of the same dtype, contiguous.
    """
    tokens, num_heads, dim = x_THD.shape
    second = x_THD if y_THD is None else y_THD
    count = 1 if y_THD is None else 2
    out = torch.empty((count, tokens, num_heads, dim), dtype=x_THD.dtype, device=x_THD.device)
    tiles, _, groups = launch.grid(tokens, 1, num_heads)
    rotate_kernel[(tiles, groups, count)](
        x_THD, second, rotary.temporal_YP2, rotary.spatial_SQ2, out, x_THD.stride(0), x_THD.stride(1),
        second.stride(0), second.stride(1), tokens, rotary.tokens_per_frame, num_heads,
        D=dim, PT=rotary.temporal_YP2.shape[1], HEADS=launch.heads_of(num_heads), ROWS=launch.rows,
        num_warps=launch.warps,
    )  # fmt: skip
    return out
