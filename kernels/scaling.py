"""How keys and values stand in FP8: stored = (value - centre) / scale; a centre for each channel, a scale a head.

Attention does not mind a constant taken from all keys (scores of a query move together; its log-sum-exp is mended), and
a constant taken from all values is added to the output. So what is common to all tokens, which is most of some channels
of K, costs none of e4m3's three mantissa bits, and does not fill the running sums of a tensor core, which cut off what
each key adds to a large one (flash3.py).

The numbers come from a sample of the block's own tokens. The history is stored with them too, with room for values
eight times as large; beyond that they are clamped. A channel's centre is

- 0, where the sample's mean is below LEAST_CENTRE of its largest value. A sample has such a mean by chance; taken from
  a history that has none, it would be one. With half of that as the limit one channel in thirty of Gaussian values was
  centred so, and over 131,040 keys FlashAttention-3's error on an H200 was 0.109, not 0.054.
- else that mean, as a multiple of what the last of bfloat16's bits is worth in the largest value. Values on bfloat16's
  grid then stay on it: some lie midway between two FP8 numbers and half of them are rounded up. Moved off it, all of
  those would go the same way: on Gaussian values an error of 0.001 of their spread in every channel's mean, which no
  number of keys averages out, against 0.00014 of 37,440 tokens' roundings.

Shape legend: T tokens, H heads, X rows of a scratch, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.kernels.grid import FP8_MAX, power_of_two_unit, to_fp8
from longtake.kernels.head_dims import fits_kernels

ROOM = 8.0
LEAST_CENTRE = 2.0**-4  # of a channel's largest value: a fifth of a Gaussian's spread, four errors of the sample's mean
CENTRE_BITS = 7  # as many as bfloat16 has after the first
TINY = 1e-30  # largest value of a channel of zeros
SAMPLED_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Of one tensor, K or V.

    Args:
        centre_HD: float32 [H, D], contiguous.
        scale_H: float32 [H], powers of two.
    """

    centre_HD: Tensor
    scale_H: Tensor

    def of_head(self, head: int) -> Scaling:
        """Of one head alone, as views."""
        return Scaling(centre_HD=self.centre_HD[head : head + 1], scale_H=self.scale_H[head : head + 1])

    def store(self, x_HXD: Tensor) -> Tensor:
        """Values to e4m3, the same shape."""
        return to_fp8((x_HXD.float() - self.centre_HD.unsqueeze(1)) / self.scale_H[:, None, None])

    def load(self, x_HXD: Tensor) -> Tensor:
        """e4m3 to values, float32."""
        return x_HXD.float() * self.scale_H[:, None, None] + self.centre_HD.unsqueeze(1)


Rows = tuple[Tensor, Scaling, Tensor]
"""What is written into a scratch, how it is scaled, and the scratch."""


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


def centre_step(largest: Tensor) -> Tensor:
    """What a centre is a multiple of: the last bit of a channel's largest value in bfloat16."""
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest.clamp(min=TINY))[1] - 1 - CENTRE_BITS)


def calibrate_reference(x_THD: Tensor, *, centred: bool = True) -> Scaling:
    """The plain twin of `calibrate`."""
    sample = x_THD[:: sample_stride(x_THD.shape[0])].float()
    centre_HD = torch.zeros_like(sample[0])
    if centred:
        mean_HD, largest_HD = sample.mean(0), sample.abs().amax(0)
        step_HD = centre_step(largest_HD)
        rounded_HD = torch.floor(mean_HD / step_HD + 0.5) * step_HD
        centre_HD = torch.where(mean_HD.abs() >= LEAST_CENTRE * largest_HD, rounded_HD, centre_HD)
    largest_H = (sample - centre_HD).abs().amax((0, 2))
    return Scaling(centre_HD=centre_HD, scale_H=power_of_two_unit(largest_H, FP8_MAX / ROOM))
