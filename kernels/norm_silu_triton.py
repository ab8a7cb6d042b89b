"""RMS norm over channels, with or without SiLU, in one Triton kernel: before nearly every convolution of Wan's VAE.

Activations are channels-last; the result may go inside a border, where a convolution wants it.

Shape legend: N pixels of all frames of all clips, C channels (contiguous); T frames, H and W pixels high and wide.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a program


@triton.jit
def norm_silu_kernel(
    x_NC, gamma_C, out, scale, floor, num_pixels, height, width,
    C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    """ROWS pixels; with BORDER, pixel (t, y, x) goes to (t, y + 1, x + 1) of frames two rows and columns larger."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, CP)
    mask = (rows < num_pixels)[:, None] & (columns < C)[None, :]
    x = tl.load(x_NC + rows[:, None] * C + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_C + columns, mask=columns < C, other=0.0).to(tl.float32) * scale
    inverse = 1.0 / tl.sqrt(tl.maximum(tl.sum(x * x, 1), floor))
    z = x * inverse[:, None] * gamma[None, :]
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    target = rows
    if BORDER:
        line = rows // width  # t * height + y
        target = (line + 2 * (line // height) + 1) * (width + 2) + rows % width + 1
    tl.store(out + target[:, None] * C + columns[None, :], z.to(out.dtype.element_ty), mask=mask)


def normalise(
    x_NC: Tensor,
    gamma_C: Tensor,
    out: Tensor,
    scale: float,
    floor: float,
    *,
    silu: bool,
    frame: tuple[int, int] = (0, 0),
) -> None:
    """Normalise pixels over channels to length `scale`, multiply by gamma, apply SiLU.

    Args:
        x_NC: [N, C] contiguous, any float type.
        gamma_C: [C] contiguous.
        out: [N, C] contiguous; with a frame, [T, H + 2, W + 2, C] contiguous, whose border is left alone.
        scale: the square root of C in Wan.
        floor: least squared length.
        silu: whether SiLU follows.
        frame: (H, W), for a border around each.
    """
    num_pixels, channels = x_NC.shape
    padded = triton.next_power_of_2(channels)
    rows = max(1, TILE // padded)
    height, width = frame
    norm_silu_kernel[(triton.cdiv(num_pixels, rows),)](
        x_NC, gamma_C, out, scale, floor, num_pixels, height, width,
        C=channels, CP=padded, ROWS=rows, SILU=silu, BORDER=height > 0,
    )  # fmt: skip
