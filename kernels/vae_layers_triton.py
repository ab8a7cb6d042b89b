"""The passes of vae_layers.py in Triton: a program is some pixels of a line of the result, all their channels.

Shape legend as there; a line is a row of one frame.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.norm_silu_triton import TILE, norm_silu
from longtake.kernels.vae_layers import FLOOR


@triton.jit(do_not_specialize=["frames", "height", "width"])  # it would gain nothing and be compiled more often
def normed_kernel(
    x_THWC, bias_C, gamma_C, past_PHWC, buffer, last_PHWC, scale, floor, frames, height, width,
    C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A line of the buffer: one of zeros at a frame's edge, one of the past, or one that is normalised."""
    channels = tl.arange(0, CP)
    line = tl.program_id(1)
    frame = line // (height + 2) - 2
    row = line % (height + 2) - 1
    columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS) - 1
    real = (channels < C)[None, :]
    inside = ((columns >= 0) & (columns < width) & (row >= 0) & (row < height))[:, None] & real
    if frame < 0:
        pixels = ((frame + 2).to(tl.int64) * height + row) * width + columns
        z = tl.load(past_PHWC + pixels[:, None] * C + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        pixels = (frame.to(tl.int64) * height + row) * width + columns
        x = tl.load(x_THWC + pixels[:, None] * C + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            x += tl.load(bias_C + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
        gamma = tl.load(gamma_C + channels, mask=channels < C, other=0.0).to(tl.float32) * scale
        z = tl.where(inside, norm_silu(x, gamma, floor), 0.0)
    z = z.to(buffer.dtype.element_ty)
    target = (line.to(tl.int64) * (width + 2) + columns + 1)[:, None] * C + channels[None, :]
    tl.store(buffer + target, z, mask=(columns <= width)[:, None] & real)
    if frame >= frames - 2:
        pixels = ((frame - frames + 2).to(tl.int64) * height + row) * width + columns
        tl.store(last_PHWC + pixels[:, None] * C + channels[None, :], z, mask=inside)


@triton.jit(do_not_specialize=["height", "width"])
def bordered_kernel(
    x_THWKC, bias_KC, buffer, height, width,
    K: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A line of the buffer."""
    channels = tl.arange(0, CP)
    line = tl.program_id(1)
    frame = line // (height + 2)
    row = line % (height + 2) - 1
    columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS) - 1
    part = frame % K
    real = (channels < C)[None, :]
    inside = ((columns >= 0) & (columns < width) & (row >= 0) & (row < height))[:, None] & real
    pixels = ((frame // K).to(tl.int64) * height + row) * width + columns
    source = pixels[:, None] * (K * C) + part * C + channels[None, :]
    x = tl.load(x_THWKC + source, mask=inside, other=0.0)
    if BIAS:
        bias = tl.load(bias_KC + part * C + channels, mask=channels < C, other=0.0).to(tl.float32)
        x = tl.where(inside, x.to(tl.float32) + bias[None, :], 0.0).to(buffer.dtype.element_ty)
    target = (line.to(tl.int64) * (width + 2) + columns + 1)[:, None] * C + channels[None, :]
    tl.store(buffer + target, x, mask=(columns <= width)[:, None] & real)


@triton.jit(do_not_specialize=["height", "width"])
def spread_kernel(
    x_THWQC, bias_C, out, height, width, C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """A line of the result, `height` lines a frame of `width` pixels; every other pixel is of the same phase."""
    channels = tl.arange(0, CP)
    line = tl.program_id(1)
    frame = line // height
    row = line % height
    columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (columns < width)[:, None] & (channels < C)[None, :]
    lines = frame.to(tl.int64) * (height // 2 + 1) + (row + 1) // 2
    pixels = lines * (width // 2 + 1) + (columns + 1) // 2
    source = (pixels * 4 + row % 2 * 2 + columns % 2)[:, None] * C + channels[None, :]
    x = tl.load(x_THWQC + source, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(bias_C + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    target = (line.to(tl.int64) * width + columns)[:, None] * C + channels[None, :]
    tl.store(out + target, x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_pixels"])
def add_kernel(x_NC, bias_C, residual_NC, num_pixels, C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr):
    """ROWS pixels, in place."""
    channels = tl.arange(0, CP)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (rows < num_pixels)[:, None] & (channels < C)[None, :]
    at = rows[:, None] * C + channels[None, :]
    total = tl.load(x_NC + at, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(bias_C + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    total += tl.load(residual_NC + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_NC + at, total.to(x_NC.dtype.element_ty), mask=mask)


def normed(
    x_THWC: Tensor,
    bias_C: Tensor | None,
    gamma_C: Tensor,
    scale: float,
    past_PHWC: Tensor,
    buffer: Tensor,
    last_PHWC: Tensor,
) -> None:
    """vae_layers.normed into `buffer` and `last_PHWC`."""
    frames, height, width, channels = x_THWC.shape
    padded, rows = tile(channels)
    normed_kernel[(triton.cdiv(width + 2, rows), buffer.shape[0] * (height + 2))](
        x_THWC, gamma_C if bias_C is None else bias_C, gamma_C, past_PHWC, buffer, last_PHWC, scale, FLOOR,
        frames, height, width, C=channels, CP=padded, ROWS=rows, BIAS=bias_C is not None,
    )  # fmt: skip


def bordered(x_THWKC: Tensor, bias_KC: Tensor | None, buffer: Tensor) -> None:
    """vae_layers.bordered into `buffer`."""
    _, height, width, parts, channels = x_THWKC.shape
    padded, rows = tile(channels)
    bordered_kernel[(triton.cdiv(width + 2, rows), buffer.shape[0] * (height + 2))](
        x_THWKC, x_THWKC if bias_KC is None else bias_KC, buffer, height, width,
        K=parts, C=channels, CP=padded, ROWS=rows, BIAS=bias_KC is not None,
    )  # fmt: skip


def spread(x_THWQC: Tensor, bias_C: Tensor, out: Tensor) -> None:
    """vae_layers.spread into `out`."""
    frames, height, width, channels = out.shape
    padded, rows = tile(channels)
    spread_kernel[(triton.cdiv(width, rows), frames * height)](
        x_THWQC, bias_C, out, height, width, C=channels, CP=padded, ROWS=rows
    )


def add(x_NC: Tensor, bias_C: Tensor, residual_NC: Tensor) -> None:
    """vae_layers.add."""
    num_pixels, channels = x_NC.shape
    padded, rows = tile(channels)
    add_kernel[(triton.cdiv(num_pixels, rows),)](
        x_NC, bias_C, residual_NC, num_pixels, C=channels, CP=padded, ROWS=rows
    )


def tile(channels: int) -> tuple[int, int]:
    """Channels rounded up to a power of two, and the pixels of a program."""
    padded = triton.next_power_of_2(channels)
    return padded, max(1, TILE // padded)
