"""RMS norm over channels and SiLU in one Triton kernel, for channels-last activations.

Shape legend: N pixels of all frames of all clips, C channels (contiguous).
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a program


@triton.jit
def norm_silu(x, gamma, floor):
    """Of pixels [ROWS, CP] in float32; gamma [CP] holds the norm's length."""
    inverse = 1.0 / tl.sqrt(tl.maximum(tl.sum(x * x, 1), floor))
    z = x * inverse[:, None] * gamma[None, :]
    return z / (1.0 + tl.exp(-z))


@triton.jit
def norm_silu_kernel(
    x_NC, gamma_C, out_NC, scale, floor, num_pixels, C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr
):
    """ROWS pixels."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, CP)
    mask = (rows < num_pixels)[:, None] & (columns < C)[None, :]
    x = tl.load(x_NC + rows[:, None] * C + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_C + columns, mask=columns < C, other=0.0).to(tl.float32) * scale
    z = norm_silu(x, gamma, floor).to(out_NC.dtype.element_ty)
    tl.store(out_NC + rows[:, None] * C + columns[None, :], z, mask=mask)


def normalise(x_NC: Tensor, gamma_C: Tensor, out_NC: Tensor, scale: float, floor: float) -> None:
    """Normalise pixels over channels to length `scale`, multiply by gamma, apply SiLU.

    Args:
        x_NC: [N, C] contiguous, any float type.
        gamma_C: [C] contiguous.
        out_NC: [N, C] contiguous.
        scale: the square root of C in Wan.
        floor: least squared length.
    """
    num_pixels, channels = x_NC.shape
    padded = triton.next_power_of_2(channels)
    rows = max(1, TILE // padded)
    norm_silu_kernel[(triton.cdiv(num_pixels, rows),)](
        x_NC, gamma_C, out_NC, scale, floor, num_pixels, C=channels, CP=padded, ROWS=rows
    )
