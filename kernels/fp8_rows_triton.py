"""GELU, largest value and rounding to e4m3 of a row in one pass: one program a row, the whole row in registers.

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

from longtake.kernels.fp8_rows import FLOOR

ELEMENTS_A_WARP = 1024  # of the first tile


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
    inverse = 1.0 / unit
    column = tl.arange(0, MAIN)
    tl.store(out + row * WIDTH + column, tl.clamp(main * inverse, -448.0, 448.0).to(tl.float8e4nv))
    if REST:
        column = MAIN + tl.arange(0, REST)
        rounded = tl.clamp(rest * inverse, -448.0, 448.0).to(tl.float8e4nv)
        tl.store(out + row * WIDTH + column, rounded, mask=column < WIDTH)


def tiles(width: int) -> tuple[int, int]:
    """Sizes of a row's two tiles; the second is 0 where the width is a power of two."""
    main = 1 << (width.bit_length() - 1)
    return main, triton.next_power_of_2(width - main) if width > main else 0


def num_warps(width: int) -> int:
    """Of a program."""
    return min(8, max(1, tiles(width)[0] // ELEMENTS_A_WARP))


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
