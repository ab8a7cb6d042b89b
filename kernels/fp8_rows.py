"""Rows in e4m3, each scaled by its own largest value: what an FP8 matrix product takes; with GELU, or with what lies
between two matrices of a transformer's layer, in one pass.

Shape legend: R rows, I row width; A and G equal groups of rows that share a gate, or factors (latent frames, or all).
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from longtake.kernels.grid import FP8, FP8_MAX

FLOOR = 1e-12  # least largest value of a row: a row of zeros stays one
_WIDEST = 16384  # row that the kernel keeps in registers


class Rounded(NamedTuple):
    """Rows for FP8 matrices: about ``rows * scale``; e4m3 [..., I] and float32 [..., 1]."""

    rows: Tensor
    scale: Tensor


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


def add_norm_round_rows(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    *,
    around_one: bool,
) -> tuple[Tensor, Rounded]:
    """``x + update * gate``, and `round_rows` of ``layer_norm(that) * scale + shift``, or ``* (1 + scale) + shift``.

    All in float32; the sum is rounded to x's type, and so is what its rows are rounded from. On a GPU one kernel, which
    reads a row once; it can stand in a graph of torch.compile. Does not synchronise.

    Args:
        x: [..., I] any float type, R rows in all, a multiple of A and of G.
        update: of the same type and shape; None: nothing is added.
        gate: float32 [..., I], A rows in all, channels contiguous; None: 1.
        scale, shift: likewise, G rows in all.
        eps: of the norm.
        around_one: add 1 to ``scale``.

    Returns:
        The sum in the type of ``x`` (``x`` itself without an update), and the rounded rows, [..., I] and [..., 1].
    """
    x_RI = x.flatten(0, -2).contiguous()
    update_RI = None if update is None else update.flatten(0, -2).contiguous()
    gate_AI, scale_GI, shift_GI = (None if one is None else one.flatten(0, -2) for one in (gate, scale, shift))
    assert scale_GI is not None and shift_GI is not None
    if x.is_cuda and 0 < x.shape[-1] <= _WIDEST:
        from longtake.kernels import fp8_rows_triton

        make = fp8_rows_triton.add_norm_round_rows
    else:
        make = add_norm_round_rows_reference
    added_RI, rounded = make(x_RI, update_RI, gate_AI, scale_GI, shift_GI, eps, around_one=around_one)
    return added_RI.view(x.shape), Rounded(rounded.rows.view(x.shape), rounded.scale.view(*x.shape[:-1], 1))


def add_norm_round_rows_reference(
    x_RI: Tensor,
    update_RI: Tensor | None,
    gate_AI: Tensor | None,
    scale_GI: Tensor,
    shift_GI: Tensor,
    eps: float,
    *,
    around_one: bool,
) -> tuple[Tensor, Rounded]:
    """The plain twin of `add_norm_round_rows`."""
    if update_RI is not None:
        update_RI = update_RI.float()
        if gate_AI is not None:
            update_RI = (update_RI.unflatten(0, (len(gate_AI), -1)) * gate_AI[:, None]).flatten(0, 1)
        x_RI = (x_RI.float() + update_RI).to(x_RI.dtype)
    factor_GI = 1 + scale_GI if around_one else scale_GI
    normed = F.layer_norm(x_RI.float(), x_RI.shape[1:], eps=eps).unflatten(0, (len(factor_GI), -1))
    normed = (normed * factor_GI[:, None] + shift_GI[:, None]).flatten(0, 1).to(x_RI.dtype)
    return x_RI, Rounded(*round_rows(normed))
