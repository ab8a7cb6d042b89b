"""RMS norm over channels and SiLU in one kernel each way, for channels-last activations.

Wan's VAE has one before nearly every convolution; apart they cost as much as the convolutions at its few channels. The
kernels do not depend on the clip's shape, so nothing is compiled anew for another one.

Shape legend: N pixels of all frames of all clips, C channels (contiguous), G programs.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

# diffusers stops at 1e-24; from here on gradients would grow past what a clipped step survives.
NORM_FLOOR = 1e-10
_PIXELS = 64  # of a program at a time
_MAX_PROGRAMS = 1024

_HAS_TRITON = importlib.util.find_spec("triton") is not None
if _HAS_TRITON:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]

    @triton.jit  # type: ignore[untyped-decorator]
    def _backward_kernel(  # type: ignore[no-untyped-def]
        x_NC, gamma_C, grad_NC, dx_NC, dgamma_GC, scale, floor, N, C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr
    ):
        columns = tl.arange(0, CP)
        gamma = tl.load(gamma_C + columns, mask=columns < C, other=0.0).to(tl.float32) * scale
        total = tl.zeros([CP], dtype=tl.float32)
        step = tl.num_programs(0) * ROWS
        for first in range(tl.program_id(0) * ROWS, N, step):
            rows = first + tl.arange(0, ROWS).to(tl.int64)
            mask = (rows < N)[:, None] & (columns < C)[None, :]
            at = rows[:, None] * C + columns[None, :]
            x = tl.load(x_NC + at, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(grad_NC + at, mask=mask, other=0.0).to(tl.float32)
            square = tl.sum(x * x, 1)
            inverse = 1.0 / tl.sqrt(tl.maximum(square, floor))
            unit = x * inverse[:, None]
            z = unit * gamma[None, :]
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            dz = grad * sigmoid * (1.0 + z * (1.0 - sigmoid))
            total += tl.sum(dz * unit, 0)
            dunit = dz * gamma[None, :]
            along = tl.where(square > floor, tl.sum(dunit * unit, 1), 0.0)  # at the floor the norm is a constant
            dx = (dunit - unit * along[:, None]) * inverse[:, None]
            tl.store(dx_NC + at, dx.to(dx_NC.dtype.element_ty), mask=mask)
        tl.store(dgamma_GC + tl.program_id(0) * C + columns, total * scale, mask=columns < C)


def norm_silu(x: Tensor, gamma: Tensor, scale: float) -> Tensor:
    """Normalise over channels to length `scale`, multiply by gamma, apply SiLU; in float32 inside.

    Args:
        x: [B, C, ...], any float dtype.
        gamma: C values, of any shape that broadcasts against x.
        scale: the square root of C in Wan.

    Returns:
        Like x.
    """
    wide = x.float()
    norm = wide * torch.rsqrt(wide.square().sum(1, keepdim=True).clamp_min(NORM_FLOOR))
    return functional.silu(norm * scale * gamma).to(x.dtype)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, gamma_C: Tensor, scale: float) -> Tensor:
        from longtake.kernels.norm_silu_triton import normalise

        out = torch.empty_like(x_NC)
        normalise(x_NC, gamma_C, out, scale, NORM_FLOOR)
        ctx.save_for_backward(x_NC, gamma_C)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        x_NC, gamma_C = ctx.saved_tensors
        pixels, channels = x_NC.shape
        grad = grads[0].contiguous()
        padded = triton.next_power_of_2(channels)
        programs = min(_MAX_PROGRAMS, triton.cdiv(pixels, _PIXELS))
        dx = torch.empty_like(x_NC)
        dgamma = torch.empty(programs, channels, dtype=torch.float32, device=x_NC.device)
        _backward_kernel[(programs,)](
            x_NC, gamma_C, grad, dx, dgamma, ctx.scale, NORM_FLOOR, pixels, C=channels, CP=padded, ROWS=_PIXELS
        )
        return dx, dgamma.sum(0).to(gamma_C.dtype), None


def fused_norm_silu(x: Tensor, gamma: Tensor, scale: float) -> Tensor:
    """`norm_silu` by Triton kernels; the result and the gradient are channels-last.

    Args:
        x: [B, C, T, H, W] on CUDA; copied first if its channels are not contiguous.
        gamma: C values.
        scale: as in `norm_silu`.

    Raises:
        RuntimeError: there is no Triton here.
    """
    if not _HAS_TRITON:
        raise RuntimeError("the fused norm needs Triton; use norm_silu")
    last = x.permute(0, 2, 3, 4, 1).contiguous()
    out: Tensor = _Fused.apply(last.view(-1, last.shape[-1]), gamma.reshape(-1), scale)  # type: ignore[no-untyped-call]
    return out.view(last.shape).permute(0, 4, 1, 2, 3)
