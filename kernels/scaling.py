"""How keys and values stand in 8 bits: stored = (value - centre) / scale; a centre for each channel, a scale a head.

Attention does not mind a constant taken from all keys (scores of a query move together; its log-sum-exp is mended), and
a constant taken from all values is added to the output. So what is common to all tokens, which is most of some channels
of K, costs none of e4m3's three mantissa bits. The numbers come from a sample of the block's own tokens: the history is
scaled by them too, with room for values eight times as large; beyond that they are clamped.

A centre much smaller than its channel's values is left where it is: it would save no bit, and values that stand on a
grid of their own (bfloat16's, a 4-bit codec's) would, moved by a constant, all be rounded a little more up or down.
On Gaussian values that was an error of 0.001 of their spread in every channel's mean (int4's: 0.0003), which no number
of keys averages out, against 0.00014 of 37,440 tokens' roundings.

Keys in int8 have a scale a row instead, found when the row is written: a grid of even steps, unlike e4m3, has no room
to spare for louder tokens.

Shape legend: T tokens, H heads, X rows of a scratch, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longtake.kernels.grid import FP8_MAX, power_of_two_unit, to_fp8, to_int8_rows
from longtake.kernels.head_dims import fits_kernels

ROOM = 8.0
LEAST_CENTRE = 0.125  # of a channel's largest value
SAMPLED_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Of one tensor, K or V.

    Args:
        centre_HD: float32 [H, D], contiguous.
        scale_H: float32 [H], powers of two: for e4m3.
        rows_HX: for int8 rows: float32 [H, X], contiguous rows; what writes a row writes its scale here.
    """

    centre_HD: Tensor
    scale_H: Tensor
    rows_HX: Tensor | None = None

    def of_head(self, head: int) -> Scaling:
        """Of one head alone, as views."""
        one = slice(head, head + 1)
        rows_HX = None if self.rows_HX is None else self.rows_HX[one]
        return Scaling(centre_HD=self.centre_HD[one], scale_H=self.scale_H[one], rows_HX=rows_HX)

    def from_row(self, row: int) -> Scaling:
        """The same, for rows of a scratch from one on."""
        return self if self.rows_HX is None else self.with_rows(self.rows_HX[:, row:])

    def with_rows(self, rows_HX: Tensor | None) -> Scaling:
        """The same, for int8 rows whose scales go there."""
        return replace(self, rows_HX=rows_HX)

    def store(self, x_HXD: Tensor) -> Tensor:
        """Values to e4m3, the same shape."""
        return to_fp8((x_HXD.float() - self.centre_HD.unsqueeze(1)) / self.scale_H[:, None, None])

    def store_into(self, x_HXD: Tensor, out_HXD: Tensor, first_row: int) -> None:
        """Write values into rows of e4m3, or of int8 with their scales, from first_row on."""
        rows = slice(first_row, first_row + x_HXD.shape[1])
        if self.rows_HX is None:
            out_HXD[:, rows] = self.store(x_HXD)
        else:
            out_HXD[:, rows], self.rows_HX[:, rows] = to_int8_rows(x_HXD.float() - self.centre_HD.unsqueeze(1))

    def load(self, x_HXD: Tensor) -> Tensor:
        """Rows from the first on to values, float32."""
        if self.rows_HX is None:
            return x_HXD.float() * self.scale_H[:, None, None] + self.centre_HD.unsqueeze(1)
        return x_HXD.float() * self.rows_HX[:, : x_HXD.shape[1], None] + self.centre_HD.unsqueeze(1)


def unscaled(num_heads: int, head_dim: int, device: torch.device) -> Scaling:
    """Centre 0, scale 1."""
    return Scaling(
        centre_HD=torch.zeros(num_heads, head_dim, device=device), scale_H=torch.ones(num_heads, device=device)
    )


def sample_stride(num_tokens: int) -> int:
    """Every how many tokens are looked at."""
    return max(1, num_tokens // SAMPLED_TOKENS)


def calibrate(x_THD: Tensor, *, centred: bool = True) -> Scaling:
    """Choose centre and scale for a tensor like this one.

    Args:
        x_THD: [T, H, D] any float type; channels contiguous.
        centred: whether to take the mean away.

    Returns:
        Scaling on the same device; CUDA work does not synchronise.
    """
    return calibrate_all((x_THD,), num_centred=int(centred))[0]


def calibrate_all(tensors: Sequence[Tensor], *, num_centred: int) -> tuple[Scaling, ...]:
    """As `calibrate`, for up to three tensors of one shape; on a GPU in one launch.

    Args:
        tensors: [T, H, D] each.
        num_centred: how many of them, from the first on, lose their mean.
    """
    if fits_kernels(*tensors):
        from longtake.kernels import scaling_triton

        return scaling_triton.calibrate(tensors, num_centred)
    return tuple(calibrate_reference(x, centred=index < num_centred) for index, x in enumerate(tensors))


def calibrate_reference(x_THD: Tensor, *, centred: bool = True) -> Scaling:
    """The plain twin of `calibrate`."""
    sample = x_THD[:: sample_stride(x_THD.shape[0])].float()
    mean_HD, none = sample.mean(0), torch.zeros_like(sample[0])
    centre_HD = torch.where(mean_HD.abs() >= LEAST_CENTRE * sample.abs().amax(0), mean_HD, none) if centred else none
    largest_H = (sample - centre_HD).abs().amax((0, 2))
    return Scaling(centre_HD=centre_HD, scale_H=power_of_two_unit(largest_H, FP8_MAX / ROOM))
