"""How close two clips are, frame by frame: PSNR and SSIM of 8-bit frames.

Shape legend: N frames, Y rows, X columns, C colours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

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
    place = torch.arange(_WINDOW, device=a.device, dtype=torch.float32) - _WINDOW // 2
    bell = torch.exp(-place.square() / (2 * _SIGMA**2))
    bell = bell / bell.sum()

    def smooth(x: Tensor) -> Tensor:
        rows: Tensor = conv2d(conv2d(x, bell[None, None, None]), bell[None, None, :, None])
        return rows

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a.square(), smooth(b * b) - mean_b.square()
    both = smooth(a * b) - mean_a * mean_b
    index = (2 * mean_a * mean_b + _C1) * (2 * both + _C2)
    index = index / ((mean_a.square() + mean_b.square() + _C1) * (var_a + var_b + _C2))
    per_frame: Tensor = index.mean(dim=(1, 2, 3)).unflatten(0, (a_NYXC.shape[0], -1)).mean(1)
    return per_frame
