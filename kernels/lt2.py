"""The project's own codec, `lt2`: a few directions at 4 bits, and what they leave at 2 bits: 2.33 bits an element.

Keys and values of a video block are mostly a constant, a few patterns, and a rest without structure. Of each head's
block are kept the mean, the R directions of largest variance (one byte a channel), and for each token R coefficients of
4 bits; the rest is divided by each channel's spread and each token's gain, which makes it a unit Gaussian more or less,
and gets 2 bits. Everything is taken from what is already rounded, so a later step repairs an earlier one's rounding.

    x[t, c] = mean[c] + sum_r (coefficient[t, r] - 7.5) * direction[r, c]  +  gain[t] * spread[c] * (code[t, c] - 1.5)

    section of one head:   | codes: T rows of D/4 bytes | coefficients: T rows of R/2 bytes | gains: T x e4m3 |
                           | directions: R x D x i8 | channels: D x u16 | units: f32 of the directions, f32 of spreads |

A channel's 16 bits are its mean, a float16 without its last 4 bits of mantissa, and in their place its spread, the
largest spread times 2^(-n/2). R is 8, 4 or 2: the most that stays within 2.33 bits, but at least 2 (8 at 4,680 x 128:
2.3299 bits; 2 at 180 x 64: 2.46).

Directions come from four rounds of orthogonal iteration on the covariance of about a thousand tokens, from a fixed
start: enough for the subspace, two products of small matrices a round, and no library call. docs/codecs.md has what was
measured, and what did not help.

Shape legend: T tokens, H heads, D head dim, R directions, N sampled tokens, B bytes of a section.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.codec import BlockGeometry, Side
from longtake.kernels.errors import ConfigError
from longtake.kernels.grid import FLOAT16_MAX, FP8, to_fp8
from longtake.kernels.hadamard import random_signs
from longtake.kernels.head_dims import HEAD_DIMS
from longtake.kernels.layout import Field, Layout, pack_codes, unpack_codes
from longtake.kernels.rotary import Rotary
from longtake.kernels.scaling import Scaling
from longtake.kernels.tensor_codec import TensorCodec

BITS = 2
COEFFICIENT_BITS = 4
RANKS = (8, 4, 2)
TARGET_BITS = 2.33
SAMPLED_TOKENS = 1024
ITERATIONS = 4
STEP_2_BITS = 0.9957  # best uniform steps of a unit Gaussian (Max, 1960)
STEP_4_BITS = 0.3352
TINY = 1e-20


class LowRankTwoBit(TensorCodec):
    """Mean, directions, and a 2-bit rest.

    Args:
        geometry: the block; the head dim a multiple of 4.
        rank: directions, 8, 4 or 2; None takes what fits the budget.
    """

    def __init__(self, geometry: BlockGeometry, rank: int | None = None) -> None:
        super().__init__(geometry)
        if geometry.head_dim % 4:
            raise ConfigError(f"lt2 packs four channels into a byte: head dim {geometry.head_dim} is no multiple.")
        budget = TARGET_BITS * geometry.num_tokens * geometry.head_dim / 8
        fitting = [r for r in RANKS if self._layout(r).num_bytes <= budget]
        self.rank = rank or (fitting or RANKS[-1:])[0]
        self.layout = self._layout(self.rank)

    def _layout(self, rank: int) -> Layout:
        tokens, dim = self.geometry.num_tokens, self.geometry.head_dim
        return Layout(
            Field(name="codes", dtype=torch.uint8, shape=(tokens, dim * BITS // 8)),
            Field(name="coefficients", dtype=torch.uint8, shape=(tokens, rank * COEFFICIENT_BITS // 8)),
            Field(name="gains", dtype=FP8, shape=(tokens,)),
            Field(name="directions", dtype=torch.int8, shape=(rank, dim)),
            Field(name="channels", dtype=torch.int16, shape=(dim,)),
            Field(name="units", dtype=torch.float32, shape=(2,)),
        )

    @property
    def sample_stride(self) -> int:
        """Every how many tokens are looked at for mean, directions and spreads."""
        return max(1, self.geometry.num_tokens // SAMPLED_TOKENS)

    @property
    def has_kernels(self) -> bool:
        return self.geometry.head_dim in HEAD_DIMS

    def pack(self, x_HTD: Tensor) -> Tensor:
        section = self.layout.empty(x_HTD.shape[:1], x_HTD.device)
        for x_TD, payload in zip(x_HTD, section, strict=True):
            self.fit(x_TD, payload)
        self.quantise(x_HTD, section)
        return section

    def fit(self, x_TD: Tensor, payload_B: Tensor) -> None:
        """Write directions, channels and units of one head (a matrix product's last bits may depend on a batch)."""
        view = self.layout.view
        sample_ND = x_TD[:: self.sample_stride]
        mean = short_float(sample_ND.mean(0))
        rest_ND = sample_ND - mean.view(torch.float16).float()
        covariance_DD = (rest_ND.T @ rest_ND) * (1.0 / rest_ND.shape[0])
        direction_DR, variance_R = orthogonal_iteration(covariance_DD, self.rank)
        scaled_RD = (direction_DR * (variance_R.sqrt() * STEP_4_BITS)).T
        unit = scaled_RD.abs().max() * (1.0 / 127)
        stored = torch.floor(scaled_RD / unit.clamp(min=TINY) + 0.5).clamp(-127, 127)
        view(payload_B, "directions").copy_(stored)
        _, rest_ND = project(rest_ND, stored * unit)
        spread = rest_ND.square().mean(0).sqrt()
        largest = spread.max()
        fall = torch.floor(-2 * torch.log2((spread / largest.clamp(min=TINY)).clamp(min=TINY)) + 0.5).clamp(0, 15)
        view(payload_B, "channels").copy_(mean | fall.to(torch.int16))
        view(payload_B, "units").copy_(torch.stack((unit, largest)))

    def quantise(self, x_HTD: Tensor, section_HB: Tensor) -> None:
        """Write codes, coefficients and gains, given what `fit` wrote."""
        view = self.layout.view
        mean_HD, spread_HD, direction_HRD = self.model(section_HB)
        coefficient, rest_HTD = project(x_HTD - mean_HD.unsqueeze(-2), direction_HRD)
        inverse_HD = torch.where(spread_HD > 0, 1.0 / spread_HD, torch.zeros_like(spread_HD))
        rest_HTD = rest_HTD * inverse_HD.unsqueeze(-2)
        gain = to_fp8((rest_HTD.square().mean(-1) * STEP_2_BITS**2).sqrt())
        step = gain.float().unsqueeze(-1)
        inverse = torch.where(step > 0, 1.0 / step, torch.zeros_like(step))
        codes = torch.floor(rest_HTD * inverse + 2).clamp(0, 3).to(torch.uint8)
        view(section_HB, "codes").copy_(pack_codes(codes, BITS))
        view(section_HB, "coefficients").copy_(pack_codes(coefficient, COEFFICIENT_BITS))
        view(section_HB, "gains").copy_(gain)

    def model(self, section_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `fit` stored: mean and spread float32 [..., D], directions float32 [..., R, D]."""
        view = self.layout.view
        channels, units = view(section_B, "channels"), view(section_B, "units")
        mean = (channels & -16).view(torch.float16).float()
        fall = (channels & 15).int()
        root = torch.where(fall % 2 == 1, 0.5**0.5, 1.0)
        spread = units[..., 1:] * (root * torch.exp2(-(fall // 2).float()))
        return mean, spread, view(section_B, "directions").float() * units[..., :1, None]

    def unpack(self, section_B: Tensor) -> Tensor:
        view = self.layout.view
        mean, spread, direction = self.model(section_B)
        x = (unpack_codes(view(section_B, "codes"), BITS).float() - 1.5) * view(section_B, "gains").float().unsqueeze(
            -1
        )
        coefficient = unpack_codes(view(section_B, "coefficients"), COEFFICIENT_BITS).float() - 7.5
        low = mean.unsqueeze(-2)
        for r in range(self.rank):
            low = low + coefficient[..., r, None] * direction[..., r, :].unsqueeze(-2)
        return x * spread.unsqueeze(-2) + low

    def pack_by_kernels(self, x_THD: Tensor, out_HB: Tensor) -> None:
        from longtake.kernels import lt2_triton

        lt2_triton.encode(x_THD, out_HB, self)

    def unpack_by_kernels(
        self, sections_GHB: Tensor, slots_N: Tensor, rotary: Rotary | None, out_HXD: Tensor, scaling: Scaling | None
    ) -> None:
        from longtake.kernels import lt2_triton

        lt2_triton.materialise(sections_GHB, slots_N, rotary, out_HXD, self, scaling)


def short_float(x: Tensor) -> Tensor:
    """Round to a float16 whose last 4 bits are 0; its bits, int16."""
    bits = x.clamp(-FLOAT16_MAX / 2, FLOAT16_MAX / 2).half().view(torch.int16)
    return (bits + 8) & -16


def orthogonal_iteration(covariance_DD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors, roughly: float32 [D, rank], orthonormal, and the variances along them, [rank]."""
    dim = covariance_DD.shape[0]
    v_DR = start_directions(dim, rank, covariance_DD.device)
    for i in range(ITERATIONS):
        v_DR = covariance_DD @ v_DR
        if i % 2:
            v_DR = orthonormalise(v_DR)
    return v_DR, (v_DR * (covariance_DD @ v_DR)).sum(0).clamp(min=0)


def start_directions(dim: int, rank: int, device: torch.device) -> Tensor:
    """Fixed random signs, float32 [dim, rank]; the same first columns for every rank."""
    return random_signs(dim * max(RANKS), 7, device).reshape(dim, max(RANKS))[:, :rank]


def orthonormalise(v_DR: Tensor) -> Tensor:
    """Gram-Schmidt on the columns; a column without length becomes 0."""
    index = torch.arange(v_DR.shape[1], device=v_DR.device)
    for r in range(v_DR.shape[1]):
        column_D1 = v_DR[:, r : r + 1]
        column_D1 = column_D1 * torch.rsqrt(column_D1.square().sum().clamp(min=TINY))
        later_DR = v_DR - column_D1 * (column_D1 * v_DR).sum(0)
        v_DR = torch.where(index == r, column_D1, torch.where(index > r, later_DR, v_DR))
    return v_DR


def project(x_TD: Tensor, direction_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Take directions off tokens one after the other.

    Args:
        x_TD: float32 [..., T, D].
        direction_RD: float32 [..., R, D].

    Returns:
        Coefficients uint8 [..., T, R], of multiples (n - 7.5) of each direction, and what is left of x.
    """
    codes = []
    for r in range(direction_RD.shape[-2]):
        direction_1D = direction_RD[..., r : r + 1, :]
        inverse = 1.0 / direction_1D.square().sum(-1).clamp(min=TINY)
        code = torch.floor((x_TD * direction_1D).sum(-1) * inverse + 8).clamp(0, 15)
        x_TD = x_TD - (code - 7.5).unsqueeze(-1) * direction_1D
        codes.append(code.to(torch.uint8))
    return torch.stack(codes, dim=-1), x_TD


def tensor_codec(name: str, geometry: BlockGeometry, side: Side) -> TensorCodec:
    """Make `lt2`; both sides alike."""
    return LowRankTwoBit(geometry)
