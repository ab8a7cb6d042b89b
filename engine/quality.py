"""How close two clips are, frame by frame: PSNR and SSIM of 8-bit frames.

Shape legend: N frames, Y rows, X columns, C colours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_FRAMES_AT_ONCE = 64


def psnr(a_NYXC: Tensor, b_NYXC: Tensor) -> Tensor:
    """PSNR in dB of each frame of two uint8 clips [N, Y, X, C]; at most 78 dB, where frames are equal."""
    error = (a_NYXC.float() - b_NYXC.float()).square().mean(dim=(1, 2, 3)).clamp_min(1e-3)
    return 10 * torch.log10(255.0**2 / error)


def ssim(a_NYXC: Tensor, b_NYXC: Tensor) -> Tensor:
    """SSIM of each frame of two uint8 clips [N, Y, X, C], the mean over colours (Wang et al. 2004).

    Gaussian windows of 11 x 11 with sigma 1.5, whole windows only, K1 = 0.01, K2 = 0.03.
    """
    pairs = zip(a_NYXC.split(_FRAMES_AT_ONCE), b_NYXC.split(_FRAMES_AT_ONCE), strict=True)
    return torch.cat([_ssim(a, b) for a, b in pairs])


def _ssim(a_NYXC: Tensor, b_NYXC: Tensor) -> Tensor:
    a, b = (x.permute(0, 3, 1, 2).flatten(0, 1)[:, None].float() for x in (a_NYXC, b_NYXC))
    weights = [math.exp(-((place - _WINDOW // 2) ** 2) / (2 * _SIGMA**2)) for place in range(_WINDOW)]
    bell = [weight / sum(weights) for weight in weights]

    def smooth(x: Tensor) -> Tensor:
        # slices and no convolution, which a GPU may round to TF32: variances are small differences of large numbers
        for dim in (2, 3):
            size = x.shape[dim] - _WINDOW + 1
            smoothed = torch.zeros_like(x.narrow(dim, 0, size))
            for place, weight in enumerate(bell):
                smoothed.add_(x.narrow(dim, place, size), alpha=weight)
            x = smoothed
        return x

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a.square(), smooth(b * b) - mean_b.square()
    both = smooth(a * b) - mean_a * mean_b
    index = (2 * mean_a * mean_b + _C1) * (2 * both + _C2)
    index = index / ((mean_a.square() + mean_b.square() + _C1) * (var_a + var_b + _C2))
    per_frame: Tensor = index.mean(dim=(1, 2, 3)).unflatten(0, (a_NYXC.shape[0], -1)).mean(1)
    return per_frame
