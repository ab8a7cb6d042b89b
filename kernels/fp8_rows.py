"""Rows in e4m3, each scaled by its own largest value: what an FP8 matrix product takes; with GELU before, in one pass.

Shape legend: R rows, I row width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from longtake.kernels.grid import FP8, FP8_MAX

FLOOR = 1e-12  # least largest value of a row: a row of zeros stays one
_WIDEST = 16384  # row that the kernel keeps in registers


def round_rows(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3 and their float32 scales [R, 1]: ``x`` is about ``rounded * scale``; a row of zeros stays one."""
    x = x_RI.float()
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=FLOOR) / FP8_MAX
    return (x / scale).to(FP8), scale


def gelu_round_rows(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """As `round_rows` of GELU (tanh) of ``x``, which is computed in float32 and not rounded in between.

    On a GPU one kernel reads a row once (compilers of fused graphs read a wide row twice, and compute GELU twice); it
    can stand in a graph of torch.compile. Does not synchronise.

    Args:
        x_RI: [R, I] any float type.

    Returns:
        e4m3 [R, I] and float32 [R, 1].
    """
    if x_RI.is_cuda and 0 < x_RI.shape[1] <= _WIDEST:
        from longtake.kernels import fp8_rows_triton

        return fp8_rows_triton.gelu_round_rows(x_RI.contiguous())
    return gelu_round_rows_reference(x_RI)


def gelu_round_rows_reference(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The plain twin of `gelu_round_rows`."""
    return round_rows(F.gelu(x_RI.float(), approximate="tanh"))
