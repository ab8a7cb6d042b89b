"""Rounding to e4m3 by a row's largest value in one pass with what comes before, GELU, or sum, norm and modulation: one
program a row, the whole row in registers.

A tile's size is a power of two and Wan's rows are not (8,960, 13,824, 14,336), so a row is two tiles: the largest power
of two that it holds, and the rest, padded.

Shape legend: R rows, I row width.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.fp8_rows import FLOOR, Rounded

ELEMENTS_A_WARP, NORM_ELEMENTS_A_WARP = 1024, 256  # of the first tile; sums and norms wait for more loads


@triton.jit
def gelu(x, row, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """GELU (tanh) of SIZE elements of a row from FIRST on, float32; zeros behind its end.

    x / 2 * (1 + tanh(u)) is x * sigmoid(2 u) = x / (1 + 2^(-2 u / ln 2)), u = sqrt(2 / pi) * (x + 0.044715 x^3).
    """
    column = FIRST + tl.arange(0, SIZE)
    value = tl.load(x + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    exponent = value * (-2.302208198144325 - 0.1029432395800235 * value * value)
    return value / (1.0 + tl.math.exp2(exponent))


@triton.jit
def gelu_round_rows_kernel(
    x, out, scale, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, FLOOR: tl.constexpr
):  # fmt: skip
    """One row of WIDTH elements, in tiles of MAIN <= WIDTH and REST >= WIDTH - MAIN elements; REST 0: one tile.

    FLOOR is a constant: compiled graphs hand numbers over in float64, which all that meets them would become.
    """
    row = tl.program_id(0).to(tl.int64)
    main = gelu(x, row, 0, MAIN, WIDTH)
    top = tl.max(tl.abs(main), 0)
    if REST:
        rest = gelu(x, row, MAIN, REST, WIDTH)
        top = tl.maximum(top, tl.max(tl.abs(rest), 0))
    unit = tl.maximum(top, FLOOR) * (1.0 / 448.0)
    tl.store(scale + row, unit)
    store_part(main, out, row, 1.0 / unit, 0, MAIN, WIDTH)
    if REST:
        store_part(rest, out, row, 1.0 / unit, MAIN, REST, WIDTH)


@triton.jit
def store_part(value, out, row, inverse, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Elements of a row from FIRST on, in e4m3."""
    column = FIRST + tl.arange(0, SIZE)
    rounded = tl.clamp(value * inverse, -448.0, 448.0).to(tl.float8e4nv)
    tl.store(out + row * WIDTH + column, rounded, mask=column < WIDTH)


@triton.jit
def added_part(
    x, update, gate, added, row, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    UPDATED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Elements of x + update * gate from FIRST on, float32 rounded to x's type, also stored; zeros behind the end."""
    column = FIRST + tl.arange(0, SIZE)
    live, place = column < WIDTH, row * WIDTH + column
    value = tl.load(x + place, mask=live, other=0.0).to(tl.float32)
    if UPDATED:
        more = tl.load(update + place, mask=live, other=0.0).to(tl.float32)
        if GATED:
            more *= tl.load(gate + column, mask=live, other=0.0)
        rounded = (value + more).to(added.dtype.element_ty)
        tl.store(added + place, rounded, mask=live)
        value = rounded.to(tl.float32)
    return value


@triton.jit
def normed_part(
    value, scale, shift, mean, inverse, dtype: tl.constexpr, AROUND_ONE: tl.constexpr,
    FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(value - mean) * inverse * scale + shift, rounded to a type; zeros behind the end."""
    column = FIRST + tl.arange(0, SIZE)
    live = column < WIDTH
    factor = tl.load(scale + column, mask=live, other=0.0)
    if AROUND_ONE:
        factor = tl.where(live, 1.0 + factor, 0.0)
    normed = (value - mean) * inverse * factor + tl.load(shift + column, mask=live, other=0.0)
    return normed.to(dtype).to(tl.float32)


@triton.jit
def off_mean(value, mean, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Sum of squares of what lies off the mean."""
    off = tl.where(FIRST + tl.arange(0, SIZE) < WIDTH, value - mean, 0.0)
    return tl.sum(off * off, 0)


@triton.jit
def add_norm_round_rows_kernel(
    x, update, gate, factor, shift, added, out, scale, gate_stride, factor_stride, shift_stride, rows_a_gate,
    rows_a_group,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, EPS: tl.constexpr, FLOOR: tl.constexpr,
    UPDATED: tl.constexpr, GATED: tl.constexpr, AROUND_ONE: tl.constexpr,
):  # fmt: skip
    """One row; tiles and constants as in gelu_round_rows_kernel."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(0) // rows_a_group
    gate += tl.program_id(0) // rows_a_gate * gate_stride
    factor += group * factor_stride
    shift += group * shift_stride
    dtype: tl.constexpr = x.dtype.element_ty
    main = added_part(x, update, gate, added, row, 0, MAIN, WIDTH, UPDATED, GATED)
    total = tl.sum(main, 0)
    if REST:
        rest = added_part(x, update, gate, added, row, MAIN, REST, WIDTH, UPDATED, GATED)
        total += tl.sum(rest, 0)
    mean = total * (1.0 / WIDTH)
    squares = off_mean(main, mean, 0, MAIN, WIDTH)
    if REST:
        squares += off_mean(rest, mean, MAIN, REST, WIDTH)
    inverse = tl.math.rsqrt(squares * (1.0 / WIDTH) + EPS)
    main = normed_part(main, factor, shift, mean, inverse, dtype, AROUND_ONE, 0, MAIN, WIDTH)
    top = tl.max(tl.abs(main), 0)
    if REST:
        rest = normed_part(rest, factor, shift, mean, inverse, dtype, AROUND_ONE, MAIN, REST, WIDTH)
        top = tl.maximum(top, tl.max(tl.abs(rest), 0))
    unit = tl.maximum(top, FLOOR) * (1.0 / 448.0)
    tl.store(scale + row, unit)
    store_part(main, out, row, 1.0 / unit, 0, MAIN, WIDTH)
    if REST:
        store_part(rest, out, row, 1.0 / unit, MAIN, REST, WIDTH)


def tiles(width: int) -> tuple[int, int]:
    """Sizes of a row's two tiles; the second is 0 where the width is a power of two."""
    main = 1 << (width.bit_length() - 1)
    return main, triton.next_power_of_2(width - main) if width > main else 0


def num_warps(width: int, elements_a_warp: int = ELEMENTS_A_WARP) -> int:
    """Of a program."""
    return min(8, max(1, tiles(width)[0] // elements_a_warp))


def gelu_round_rows(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Triton twin of fp8_rows.gelu_round_rows_reference: x [R, I] contiguous, I from 1 to 16384."""
    rows, width = x_RI.shape
    out_RI = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x_RI.device)
    scale_R1 = torch.empty((rows, 1), dtype=torch.float32, device=x_RI.device)
    main, rest = tiles(width)
    gelu_round_rows_kernel[(rows,)](
        x_RI, out_RI, scale_R1, WIDTH=width, MAIN=main, REST=rest, FLOOR=FLOOR, num_warps=num_warps(width)
    )
    return out_RI, scale_R1


def add_norm_round_rows(
    x_RI: Tensor,
    update_RI: Tensor | None,
    gate_AI: Tensor | None,
    scale_GI: Tensor,
    shift_GI: Tensor,
    eps: float,
    *,
    around_one: bool,
) -> tuple[Tensor, Rounded]:
    """Triton twin of fp8_rows.add_norm_round_rows_reference: channels contiguous, I from 1 to 16384."""
    rows, width = x_RI.shape
    added_RI = x_RI if update_RI is None else torch.empty_like(x_RI)
    gate = scale_GI if gate_AI is None else gate_AI
    out_RI = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x_RI.device)
    scale_R1 = torch.empty((rows, 1), dtype=torch.float32, device=x_RI.device)
    main, rest = tiles(width)
    add_norm_round_rows_kernel[(rows,)](
        x_RI, x_RI if update_RI is None else update_RI, gate, scale_GI, shift_GI, added_RI, out_RI, scale_R1,
        gate.stride(0), scale_GI.stride(0), shift_GI.stride(0), rows // gate.shape[0], rows // scale_GI.shape[0],
        WIDTH=width, MAIN=main, REST=rest, EPS=eps, FLOOR=FLOOR, UPDATED=update_RI is not None,
        GATED=gate_AI is not None, AROUND_ONE=around_one, num_warps=num_warps(width, NORM_ELEMENTS_A_WARP),
    )  # fmt: skip
    return added_RI, Rounded(out_RI, scale_R1)
