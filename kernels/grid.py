"""Small grids that codes stand on: affine grids with float16 or FP8 parameters, and the best levels for a Gaussian.

FP8 here is e4m3 (largest 448, smallest normal 2^-6). Values beyond 448 are clamped: PyTorch's cast would make them NaN.
What is rounded to FP8 is first divided by a power of two, the section's `unit`, so that its range fits.

Shape legend: C channels of a group, L levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FLOAT16_MAX = 65504.0

# Lloyd-Max levels of a unit Gaussian, positive half: what minimises the mean squared error of 2, 3 and 4 bits
# (J. Max, Quantizing for minimum distortion, 1960). Errors: 0.1175, 0.03454, 0.009497.
_GAUSSIAN_LEVELS = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6180, 2.0690, 2.7326),
}


def to_fp8(x: Tensor) -> Tensor:
    """Round to e4m3, clamping what is too large."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def power_of_two_unit(largest: Tensor, target: float = FP8_MAX) -> Tensor:
    """The smallest power of two u such that largest / u <= target; 1 where largest is 0 or not finite.

    Args:
        largest: float32, not negative.
        target: the largest value wanted after division.

    Returns:
        float32 of the same shape.
    """
    usable = torch.isfinite(largest) & (largest > 0)
    exponent = torch.ceil(torch.log2(torch.where(usable, largest, torch.full_like(largest, target)) / target))
    return torch.exp2(exponent.clamp(-120, 120))


def quantise_affine(x_C: Tensor, step_1: Tensor, zero_1: Tensor, bits: int) -> Tensor:
    """Codes of the nearest of 2^bits levels zero + code * step, uint8 [..., C]; a step of 0 gives code 0."""
    inverse = torch.where(step_1 > 0, 1.0 / step_1, torch.zeros_like(step_1))
    level: Tensor = torch.floor((x_C - zero_1) * inverse + 0.5)
    return level.clamp(0, 2**bits - 1).to(torch.uint8)


def quantise_symmetric(x_C: Tensor, step_1: Tensor, bits: int) -> Tensor:
    """Codes of the nearest of 2^bits levels (code - (2^bits - 1) / 2) * step, uint8 [..., C]."""
    return quantise_affine(x_C, step_1, step_1 * (-0.5 * (2**bits - 1)), bits)


def symmetric_values(codes_C: Tensor, step_1: Tensor, bits: int) -> Tensor:
    """Undo `quantise_symmetric`, float32 [..., C]."""
    values: Tensor = (codes_C.float() - 0.5 * (2**bits - 1)) * step_1
    return values


def best_symmetric_step(x_C: Tensor, bits: int, unit: Tensor, num_candidates: int = 10) -> Tensor:
    """The FP8 step of least squared error, of several between a fraction of the group's largest value and all of it.

    Args:
        x_C: float32 [..., C], a group in the last dim.
        bits: of a code.
        unit: float32 [..., 1], power of two that the FP8 number counts in.
        num_candidates: how many are tried.

    Returns:
        float8_e4m3fn [..., 1]: step / unit.
    """
    widest = x_C.abs().amax(-1, keepdim=True) / (0.5 * (2**bits - 1)) / unit
    smallest = 0.4 if bits <= 2 else 0.6
    best = to_fp8(widest)
    best_error = torch.full_like(widest, torch.inf)
    for i in range(num_candidates):
        stored = to_fp8(widest * (1.0 - (1.0 - smallest) * i / (num_candidates - 1)))
        step = stored.float() * unit
        error = (symmetric_values(quantise_symmetric(x_C, step, bits), step, bits) - x_C).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, stored.float(), best.float()).to(FP8)
    return best


def gaussian_levels(bits: int, device: torch.device) -> Tensor:
    """Lloyd-Max levels of a unit Gaussian, ascending, float32 [2^bits]; bits 2, 3 or 4."""
    half = _GAUSSIAN_LEVELS[bits]
    return torch.tensor([-x for x in reversed(half)] + list(half), dtype=torch.float32, device=device)


def nearest_level(x: Tensor, levels_L: Tensor) -> Tensor:
    """Index of the nearest of ascending levels, uint8; ties go to the lower level."""
    return torch.bucketize(x.contiguous(), 0.5 * (levels_L[1:] + levels_L[:-1])).to(torch.uint8)
