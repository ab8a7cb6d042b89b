"""Queries, keys and values for tests and benchmarks: plain noise, or the structure seen in causal video models.

The structured kind has what codecs exploit or stumble over: a constant offset in every channel with a few outlier
channels twenty times as large (keys), a handful of patterns whose strength varies smoothly over time, rows and columns,
slow drift from block to block, and heavy-tailed noise. Queries look for keys that exist, so attention is peaked. It
stands in for a model's K/V where none is at hand; claims about quality use a trained model.

Shape legend: N blocks, F latent frames of a block, T tokens of a block, H heads, D head dim, R patterns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.kernels.codec import BlockGeometry
from longtake.kernels.principal import HistoryBasis

NUM_PATTERNS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Tokens of a block: frames x rows x columns."""

    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        """Tokens of a block."""
        return self.frames * self.height * self.width

    def geometry(self, head_dim: int) -> BlockGeometry:
        """Of such a block, as codecs take it."""
        return BlockGeometry(num_tokens=self.num_tokens, head_dim=head_dim, grid=(self.height, self.width))


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What attention reads: blocks of keys and values before RoPE, and queries of the block after them.

    Args:
        k_NTHD: keys.
        v_NTHD: values.
        q_THD: queries, after norm, before RoPE.
    """

    k_NTHD: Tensor
    v_NTHD: Tensor
    q_THD: Tensor


def _smooth_fields(grid: Grid, blocks: int, count: int, generator: torch.Generator) -> Tensor:
    """Unit-variance fields over (block, frame, row, column), a few waves each: float32 [blocks * T, count]."""
    device = generator.device
    time = torch.arange(blocks * grid.frames, device=device) / grid.frames
    row = torch.arange(grid.height, device=device) / grid.height
    column = torch.arange(grid.width, device=device) / grid.width
    field = torch.zeros(blocks * grid.frames, grid.height, grid.width, count, device=device)
    waves = 6
    for _ in range(waves):
        speed, up, across = (torch.randn(count, generator=generator, device=device) for _ in range(3))
        phase = 2 * math.pi * torch.rand(count, generator=generator, device=device)
        field += torch.cos(
            0.5 * speed * time[:, None, None, None]
            + 2 * math.pi * 1.5 * (up * row[:, None, None] + across * column[:, None])
            + phase
        )
    return field.reshape(-1, count) * math.sqrt(2 / waves)


def structured(
    grid: Grid, *, blocks: int, heads: int, dim: int, seed: int = 0, device: torch.device | str = "cpu"
) -> History:
    """Structured history in float32.

    Args:
        grid: tokens of a block.
        blocks: how many.
        heads: heads, each drawn apart.
        dim: channels of a head.
        seed: of the draw; the same seed draws other numbers on another kind of device.
        device: where it is drawn and stays.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tokens = blocks * grid.num_tokens
    shape = (blocks, grid.num_tokens, heads, dim)
    k, v = (torch.empty(shape, device=device) for _ in range(2))
    q = torch.empty(shape[1:], device=device)
    for head in range(heads):
        for out, offset, outlier in ((k, 0.6, 20.0), (v, 0.2, 4.0)):
            out[:, :, head] = _tensor(grid, blocks, dim, offset, outlier, generator).reshape(blocks, -1, dim)
        centred = k[:, :, head].reshape(tokens, dim) - k[:, :, head].mean((0, 1))
        wanted = torch.randint(tokens, (grid.num_tokens,), generator=generator, device=device)
        seen = centred[wanted] / centred.std()
        q[:, head] = seen + torch.randn(seen.shape, generator=generator, device=device)
    return History(k_NTHD=k, v_NTHD=v, q_THD=q)


def _tensor(grid: Grid, blocks: int, dim: int, offset: float, outlier: float, generator: torch.Generator) -> Tensor:
    """One head's K or V, float32 [blocks * T, D]: offset + smooth patterns + heavy-tailed noise, some channels loud."""
    device, tokens = generator.device, blocks * grid.num_tokens

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    patterns_RD = normal(NUM_PATTERNS, dim) / math.sqrt(NUM_PATTERNS)
    strength = 1.6 * 0.8 ** torch.arange(NUM_PATTERNS, device=device)
    smooth = (_smooth_fields(grid, blocks, NUM_PATTERNS, generator) * strength) @ patterns_RD
    tails = normal(tokens, dim) * torch.exp(0.3 * normal(tokens, 1))
    loud = torch.ones(dim, device=device)
    loud[torch.randperm(dim, generator=generator, device=device)[: dim // 32]] = outlier
    return offset * normal(dim) * loud + (smooth + 0.5 * tails) * loud.clamp(max=3.0)


def random_basis(layers: int, heads: int, dim: int, device: torch.device | str = "cpu") -> HistoryBasis:
    """Matrices for the codecs that turn heads: they mix channels at random, and make some components larger."""
    generator = torch.Generator().manual_seed(dim)
    mixing_HEE = torch.linalg.qr(torch.randn(heads, 2 * dim, 2 * dim, generator=generator)).Q
    turn_HEE = mixing_HEE * torch.linspace(0.5, 2.0, 2 * dim)
    return HistoryBasis(turn_HEE.to(device, torch.bfloat16).expand(layers, -1, -1, -1))


def noise(
    grid: Grid, *, blocks: int, heads: int, dim: int, seed: int = 0, device: torch.device | str = "cpu"
) -> History:
    """Gaussian history in float32: nothing to exploit. Arguments as for `structured`."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (blocks, grid.num_tokens, heads, dim)
    k, v = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    return History(k_NTHD=k, v_NTHD=v, q_THD=torch.randn(shape[1:], generator=generator, device=device))
