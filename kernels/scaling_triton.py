"""FP8 in Triton: calibration, the store at the end of every materialise kernel, and the store of a block's own K or V.

Shape legend: T tokens, H heads, D head dim, R rows of a tile.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.grid import FP8_MAX
from longtake.kernels.scaling import CENTRE_BITS, LEAST_CENTRE, ROOM, TINY, Rows, Scaling, sample_stride

CALIBRATE_ROWS, CALIBRATE_WARPS, CALIBRATE_STAGES = 64, 16, 4  # few programs, each bound by waiting for its loads
STORE_ROWS = 64


@triton.jit
def put(tile, out, head, row_R, live_R, stride_oh, stride_ox, stride_od, D: tl.constexpr, TURNED: tl.constexpr):
    """Store a tile [R, D] into rows of a head, in out's type.

    TURNED: out's tokens are contiguous, not its channels; the tile is turned first, so that stores are wide: as wide as
    the first row is known to be aligned (`token_alignment`).
    """
    column = tl.arange(0, D)
    base = out + head.to(tl.int64) * stride_oh
    if TURNED:
        place = base + column[:, None] * stride_od + row_R[None, :]
        tl.store(place, tl.trans(tile.to(out.dtype.element_ty)), mask=live_R[None, :])
    else:
        place = base + row_R[:, None] * stride_ox + column[None, :]
        tl.store(place, tile.to(out.dtype.element_ty), mask=live_R[:, None])


@triton.jit
def emit(
    tile, out, head, row_R, live_R, stride_oh, stride_ox, stride_od, centre, scale,
    D: tl.constexpr, SCALED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Store a float32 tile [R, D] into rows of a head, in out's type; SCALED: as (tile - centre) / scale, clamped.

    TURNED: as `put`.
    """
    column = tl.arange(0, D)
    if SCALED:
        tile = tile - tl.load(centre + head * D + column)[None, :]
        tile = tile * (1.0 / tl.load(scale + head))
        tile = tl.clamp(tile, -448.0, 448.0)
    put(tile, out, head, row_R, live_R, stride_oh, stride_ox, stride_od, D, TURNED)


@triton.jit
def calibrate_kernel(
    x, y, z, centre, scale, x_stride_t, x_stride_h, y_stride_t, y_stride_h, z_stride_t, z_stride_h, sampled, stride,
    D: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, TARGET: tl.constexpr,
    LEAST: tl.constexpr, BITS: tl.constexpr, TINY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of one head of x, y or z: mean of each channel, to the next step of `scaling.centre_step` (0 but for the first
    CENTRED tensors, and where it is less than LEAST of the channel's largest), then the power of two that brings the
    largest distance from it to TARGET or below.
    """
    head, which = tl.program_id(0), tl.program_id(1)
    stride_t, stride_h = x_stride_t, x_stride_h
    if which == 1:
        x = y
        stride_t, stride_h = y_stride_t, y_stride_h
    if which == 2:
        x = z
        stride_t, stride_h = z_stride_t, z_stride_h
    column = tl.arange(0, D)[None, :]
    total = tl.zeros((ROWS, D), tl.float32)
    least = tl.full((ROWS, D), float("inf"), tl.float32)
    most = tl.full((ROWS, D), float("-inf"), tl.float32)
    for first in tl.range(0, sampled, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        live = (row < sampled)[:, None]
        place = x + (row * stride).to(tl.int64)[:, None] * stride_t + head * stride_h + column
        tile = tl.load(place, mask=live, other=0.0).to(tl.float32)
        total += tile
        least = tl.minimum(least, tl.where(live, tile, float("inf")))
        most = tl.maximum(most, tl.where(live, tile, float("-inf")))
    low, high = tl.min(least, 0), tl.max(most, 0)
    mean = tl.zeros((D,), tl.float32)
    if which < CENTRED:
        mean = tl.sum(total, 0) / sampled
        largest = tl.maximum(-low, high)
        exponent = tl.maximum(largest, TINY).to(tl.int32, bitcast=True) & 0x7F800000
        step = exponent.to(tl.float32, bitcast=True) / (1 << BITS)
        mean = tl.where(tl.abs(mean) >= LEAST * largest, tl.floor(mean / step + 0.5) * step, 0.0)
    top = tl.max(tl.maximum(high - mean, mean - low), 0)  # the farthest is the least or the most
    exponent = tl.ceil(tl.math.log2(tl.where(top > 0, top, TARGET) / TARGET))
    line = which * tl.num_programs(0) + head
    tl.store(scale + line, tl.math.exp2(tl.minimum(tl.maximum(exponent, -120.0), 120.0)))
    tl.store(centre + line * D + tl.arange(0, D), mean)


@triton.jit
def store_rows(
    x, out, centre, scale, stride_t, stride_h, stride_oh, stride_ox, stride_od, first_row, tokens,
    D: tl.constexpr, TURNED: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head of x [T, H, D] into rows first_row .. of the scratch."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tokens // ALIGN * ALIGN  # the same number, seen to be aligned
    place = x + row.to(tl.int64)[:, None] * stride_t + head * stride_h + tl.arange(0, D)[None, :]
    tile = tl.load(place, mask=live[:, None], other=0.0).to(tl.float32)
    target = tl.cast(first_row, tl.int64) // ALIGN * ALIGN + row
    emit(tile, out, head, target, live, stride_oh, stride_ox, stride_od, centre, scale, D, True, TURNED)


@triton.jit(do_not_specialize=["first_row", "tokens"])  # a history grows: one build serves all, graphs too
def store_kernel(
    x, out_x, centre_x, scale_x, x_stride_t, x_stride_h, x_stride_oh, x_stride_ox, x_stride_od,
    y, out_y, centre_y, scale_y, y_stride_t, y_stride_h, y_stride_oh, y_stride_ox, y_stride_od, first_row, tokens,
    D: tl.constexpr, TURNED: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows of x, and on the grid's second layer of y, which may be TURNED."""
    if tl.program_id(2) == 0:
        store_rows(x, out_x, centre_x, scale_x, x_stride_t, x_stride_h, x_stride_oh, x_stride_ox, x_stride_od,
                   first_row, tokens, D, False, ROWS, ALIGN)  # fmt: skip
    else:
        store_rows(y, out_y, centre_y, scale_y, y_stride_t, y_stride_h, y_stride_oh, y_stride_ox, y_stride_od,
                   first_row, tokens, D, TURNED, ROWS, ALIGN)  # fmt: skip


def token_alignment(*counts: int) -> int:
    """The largest power of two, up to 16, that divides them: FP8 stores along tokens can be that many bytes wide."""
    return math.gcd(16, *counts)


def calibrate(tensors: Sequence[Tensor], num_centred: int) -> tuple[Scaling, ...]:
    """Triton twin of scaling.calibrate, for up to three tensors in one launch.

    Args:
        tensors: [T, H, D] of one shape, D 64 or 128, channels contiguous.
        num_centred: how many of them, from the first on, lose their mean.
    """
    x, y, z = (tensors[min(index, len(tensors) - 1)] for index in range(3))
    tokens, num_heads, dim = x.shape
    centre = torch.empty((len(tensors), num_heads, dim), dtype=torch.float32, device=x.device)
    scale = torch.empty((len(tensors), num_heads), dtype=torch.float32, device=x.device)
    stride = sample_stride(tokens)
    calibrate_kernel[(num_heads, len(tensors))](
        x, y, z, centre, scale, x.stride(0), x.stride(1), y.stride(0), y.stride(1), z.stride(0), z.stride(1),
        triton.cdiv(tokens, stride), stride,
        D=dim, CENTRED=num_centred, ROWS=CALIBRATE_ROWS, TARGET=FP8_MAX / ROOM,
        LEAST=LEAST_CENTRE, BITS=CENTRE_BITS, TINY=TINY, STAGES=CALIBRATE_STAGES, num_warps=CALIBRATE_WARPS,
    )  # fmt: skip
    return tuple(Scaling(centre_HD=c, scale_H=s) for c, s in zip(centre, scale, strict=True))


def store(keys: Rows, values: Rows, first_row: int) -> None:
    """Write a block's own keys and values into FP8 scratches, in one launch.

    Args:
        keys, values: x_THD ([T, H, D] of one shape, D 64 or 128, channels contiguous), the scaling of its scratch, and
            that: e4m3 [H, X, D], keys with channels contiguous, values with channels or tokens.
        first_row: of the T rows.
    """
    tokens, num_heads, dim = keys[0].shape
    sides: list[Tensor | int] = []
    for x_THD, scaling, out_HXD in (keys, values):
        sides += [x_THD, out_HXD, scaling.centre_HD, scaling.scale_H, *x_THD.stride()[:2], *out_HXD.stride()]
    store_kernel[(triton.cdiv(tokens, STORE_ROWS), num_heads, 2)](
        *sides, first_row, tokens,
        D=dim, TURNED=values[2].stride(2) != 1, ROWS=STORE_ROWS, ALIGN=token_alignment(tokens, first_row),
    )  # fmt: skip
