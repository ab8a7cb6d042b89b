"""Orthogonal rotations of a head's channels that need no stored matrix: Hadamard, and Hadamard with random signs.

A rotation spreads outlier channels over all channels. It is computed as log2(C) rounds of sums and differences, in
float32: the same bits on every device, whatever is rotated beside it. Head dims that are no power of two are rotated in
blocks of their largest power of two.

Shape legend: D head dim, C channels of a Hadamard block (a power of two).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def hadamard(x_D: Tensor) -> Tensor:
    """Multiply the last dim by the orthonormal Hadamard matrix (Sylvester's order); its own inverse.

    Args:
        x_D: float32 [..., D].

    Returns:
        float32 of the same shape.
    """
    dim = x_D.shape[-1]
    block = dim & -dim
    y = x_D.reshape(-1, block)
    half = 1
    while half < block:
        pair = y.reshape(-1, block // (2 * half), 2, half)
        first, second = pair[:, :, 0], pair[:, :, 1]
        y = torch.stack((first + second, first - second), dim=2).reshape(-1, block)
        half *= 2
    return y.mul(float(block) ** -0.5).reshape(x_D.shape)


@cache  # tables stay: recorded passes read them
def random_signs(dim: int, stream: int, device: torch.device) -> Tensor:
    """A fixed draw of +1 and -1, float32 [dim]: bits of splitmix64, the same on every machine and version."""
    mask, signs = (1 << 64) - 1, []
    for i in range(dim):
        state = ((stream * dim + i + 1) * 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        signs.append(1.0 - 2.0 * ((state ^ (state >> 31)) & 1))
    return torch.tensor(signs, dtype=torch.float32, device=device)


def rotate_randomly(x_D: Tensor) -> Tensor:
    """A fixed random rotation of the last dim: signs, Hadamard, signs, Hadamard."""
    dim, device = x_D.shape[-1], x_D.device
    return hadamard(hadamard(x_D * random_signs(dim, 0, device)) * random_signs(dim, 1, device))


def rotate_back(x_D: Tensor) -> Tensor:
    """Undo `rotate_randomly`."""
    dim, device = x_D.shape[-1], x_D.device
    return hadamard(hadamard(x_D) * random_signs(dim, 1, device)) * random_signs(dim, 0, device)
