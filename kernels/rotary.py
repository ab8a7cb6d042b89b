"""Rotary position embedding in three axes (time, row, column), with positions given by the caller and no table limit.

Keys are stored before RoPE; a block gets its position in time when it is read. A head's D/2 complex pairs (interleaved:
channels 2p and 2p+1) are dealt to the axes in the order time, row, column, Pt + Ph + Pw = D/2 (22 + 21 + 21 at D =
128). Pair p of an axis with P pairs turns by position * theta^(-p/P). Instead of one [T, D/2] table, cosines and sines
are kept apart by what they depend on:

    temporal_YP2   [Y latent frames, Pt, (cos, sin)]       a few kilobytes, rebuilt whenever positions change
    spatial_SQ2    [S tokens of a frame, Ph + Pw, (cos, sin)]   the same for a whole rollout

Shape legend: Y latent frames, S tokens of a latent frame, T = Y*S tokens (order frame, row, column), H heads, D head
dim, P temporal pairs, Q = D/2 - P spatial pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from longtake.kernels.errors import ConfigError
from longtake.kernels.head_dims import fits_kernels

THETA = 10000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Cosines and sines of some latent frames.

    Args:
        temporal_YP2: float32 [Y, P, 2], one row for each latent frame.
        spatial_SQ2: float32 [S, Q, 2], one row for each token of a latent frame.
    """

    temporal_YP2: Tensor
    spatial_SQ2: Tensor

    @property
    def num_frames(self) -> int:
        """Latent frames covered."""
        return self.temporal_YP2.shape[0]

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        return self.spatial_SQ2.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens covered."""
        return self.num_frames * self.tokens_per_frame

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return 2 * (self.temporal_YP2.shape[1] + self.spatial_SQ2.shape[1])

    def frames(self, first: int, count: int) -> Rotary:
        """The tables of `count` latent frames from the `first`, as views."""
        return Rotary(temporal_YP2=self.temporal_YP2[first : first + count], spatial_SQ2=self.spatial_SQ2)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRotary:
    """Tables of the same tokens for each head apart, where heads turn at other speeds.

    Args:
        heads: one for each head that is turned, in order.
    """

    heads: tuple[Rotary, ...]

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        return self.heads[0].tokens_per_frame

    @property
    def num_tokens(self) -> int:
        """Tokens covered."""
        return self.heads[0].num_tokens

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.heads[0].head_dim


Turns: TypeAlias = Rotary | HeadRotary


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """How many complex pairs of a head turn with time, row and column: (Pt, Ph, Pw)."""
    if head_dim < 6 or head_dim % 2:
        raise ConfigError(f"head dim {head_dim} has no rotary split: use an even number of at least 6.")
    side = head_dim // 6
    return head_dim // 2 - 2 * side, side, side


def _angles(positions: Sequence[int | float], num_pairs: int, theta: float = THETA) -> Tensor:
    """Cosines and sines, float32 [len(positions), num_pairs, 2], computed in float64 on the CPU."""
    position = torch.tensor([float(p) for p in positions], dtype=torch.float64)
    exponent = torch.arange(num_pairs, dtype=torch.float64) / num_pairs
    angle = position[:, None] * theta ** (-exponent)[None, :]
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


@lru_cache(maxsize=16)
def _spatial_table(
    height: int, width: int, head_dim: int, device: torch.device, merged: tuple[int, int] = (1, 1)
) -> Tensor:
    _, pairs_h, pairs_w = axis_pairs(head_dim)
    centre_y, centre_x = ((count - 1) / 2 for count in merged)
    rows = _angles([row * merged[0] + centre_y for row in range(height)], pairs_h)
    columns = _angles([column * merged[1] + centre_x for column in range(width)], pairs_w)
    rows = rows[:, None].expand(height, width, pairs_h, 2)
    columns = columns[None].expand(height, width, pairs_w, 2)
    return torch.cat((rows, columns), dim=2).reshape(height * width, pairs_h + pairs_w, 2).contiguous().to(device)


def rotary_table(
    frame_positions: Sequence[int | float],
    height: int,
    width: int,
    head_dim: int,
    device: torch.device | str = "cpu",
    *,
    merged: tuple[int, int] = (1, 1),
    theta: float = THETA,
) -> Rotary:
    """Build the tables of some latent frames.

    Args:
        frame_positions: the position in time of each latent frame; any order, any size, repeats allowed.
        height: rows of tokens in a latent frame.
        width: columns of tokens in a latent frame.
        head_dim: channels of one head, even.
        device: where the tables go.
        merged: rows and columns of a full frame that one row and column stand for; they stand at the middle of those.
        theta: base of the speeds in time; those in space are the model's.

    Returns:
        Tables for len(frame_positions) * height * width tokens; the spatial one is shared between calls and must not be
        written. On CUDA the temporal one arrives on the current stream, without synchronising.
    """
    device = torch.device(device)
    pairs_t, _, _ = axis_pairs(head_dim)
    temporal = _angles(frame_positions, pairs_t, theta)
    if device.type == "cuda":  # pinned: the host does not wait for what the stream has still to do
        temporal = temporal.pin_memory()
    temporal = temporal.to(device, non_blocking=True)
    return Rotary(temporal_YP2=temporal, spatial_SQ2=_spatial_table(height, width, head_dim, device, merged))


def rotate_pairs(x_TD: Tensor, rotary: Rotary) -> Tensor:
    """Apply RoPE in float32 to a tensor whose last dims are (tokens, channels).

    Args:
        x_TD: float32 [..., T, D], T = the rotary's tokens.
        rotary: tables of the same tokens.

    Returns:
        float32 of the same shape.
    """
    lead = x_TD.shape[:-2]
    num_frames, tokens, pairs_t = rotary.num_frames, rotary.tokens_per_frame, rotary.temporal_YP2.shape[1]
    x = x_TD.reshape(*lead, num_frames, tokens, -1, 2)
    out = torch.empty_like(x)
    for pairs, table in (
        (slice(0, pairs_t), rotary.temporal_YP2[:, None]),
        (slice(pairs_t, None), rotary.spatial_SQ2[None]),
    ):
        real, imag = x[..., pairs, 0], x[..., pairs, 1]
        cos, sin = table[..., 0], table[..., 1]
        out[..., pairs, 0] = real * cos - imag * sin
        out[..., pairs, 1] = real * sin + imag * cos
    return out.reshape(x_TD.shape)


def apply_rotary(x_THD: Tensor, rotary: Turns) -> Tensor:
    """Turn queries or a block's own keys to their positions.

    Args:
        x_THD: [..., T, H, D] any float type; tokens in the order frame, row, column.
        rotary: tables of exactly those T tokens.

    Returns:
        The same shape and dtype, contiguous; computed in float32.

    Raises:
        ConfigError: the tables are for another number of tokens or of heads, or another head dim.
    """
    if x_THD.shape[-3] != rotary.num_tokens or x_THD.shape[-1] != rotary.head_dim:
        raise ConfigError(
            f"rotary tables for {rotary.num_tokens} tokens x {rotary.head_dim} channels do not fit a tensor of shape "
            f"{tuple(x_THD.shape)} [..., tokens, heads, channels]."
        )
    if isinstance(rotary, HeadRotary):
        check_heads(rotary, x_THD.shape[-2])
        turned = [apply_rotary(x_THD[..., head, None, :], one) for head, one in enumerate(rotary.heads)]
        return torch.cat(turned, dim=-2)
    sequence = x_THD.shape[-3:]
    if fits_kernels(x_THD) and x_THD.numel() == sequence.numel():
        from longtake.kernels import rotary_triton

        return rotary_triton.rotate(x_THD.reshape(sequence), rotary)[0].reshape(x_THD.shape)
    rotated = rotate_pairs(x_THD.transpose(-3, -2).float(), rotary)
    return rotated.transpose(-3, -2).to(x_THD.dtype).contiguous()


def apply_rotary_pair(x_THD: Tensor, y_THD: Tensor, rotary: Turns) -> tuple[Tensor, Tensor]:
    """`apply_rotary` of two tensors [T, H, D] of one shape and dtype; on a GPU in one launch where it can be."""
    same = x_THD.shape[0] == rotary.num_tokens and x_THD.shape[-1] == rotary.head_dim
    if same and isinstance(rotary, Rotary) and fits_kernels(x_THD, y_THD):
        from longtake.kernels import rotary_triton

        turned = rotary_triton.rotate(x_THD, rotary, y_THD)
        return turned[0], turned[1]
    return apply_rotary(x_THD, rotary), apply_rotary(y_THD, rotary)


def check_heads(rotary: HeadRotary, num_heads: int) -> None:
    """Raise unless there is a table for each head.

    Raises:
        ConfigError: there are more or fewer.
    """
    if len(rotary.heads) != num_heads:
        raise ConfigError(f"rotary tables for {len(rotary.heads)} heads do not fit {num_heads} heads.")
