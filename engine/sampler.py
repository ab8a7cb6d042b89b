"""The few-step sampler of the Self-Forcing family (arXiv 2506.08009): predict the clean block, re-noise, repeat.

With ``x_t = (1 - sigma) * x0 + sigma * noise`` the model predicts the flow ``noise - x0``, hence
``x0 = x_t - sigma * flow``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longtake.engine.config import SamplerConfig


def shifted_sigmas(config: SamplerConfig, *, first: bool = False, strength: float = 1.0) -> tuple[float, ...]:
    """Noise levels of the denoising steps: ``shift * s / (1 + (shift - 1) * s)`` of each ``strength * step / 1000``.

    Args:
        config: steps and shift.
        first: of a shot's first block.
        strength: in (0, 1]; below 1 where a guide is noised instead of starting from noise alone.

    Returns:
        One sigma in (0, 1] a step; 1000, 750, 500, 250 with shift 5 give 1, 0.9375, 0.8333, 0.625.
    """
    timesteps = config.first_timesteps if first and config.first_timesteps is not None else config.timesteps
    levels = (strength * step / 1000 for step in timesteps)
    return tuple(config.shift * level / (1 + (config.shift - 1) * level) for level in levels)


def denoise(
    predict_flow: Callable[[Tensor, float], Tensor],
    noise: Callable[[int], Tensor],
    sigmas: tuple[float, ...],
    *,
    guide: Tensor | None = None,
    fixed: Tensor | None = None,
) -> Tensor:
    """Run the denoising steps of one block.

    Args:
        predict_flow: (noisy latents [C, F, Y, X], sigma) -> flow of the same shape.
        noise: step -> fresh float32 noise [C, F, Y, X] on the device of the latents.
        sigmas: from :func:`shifted_sigmas`.
        guide: clean latents [C, F, Y, X] that the first step starts from, noised to its sigma; None: from noise.
        fixed: clean latents [C, f, Y, X] of the first f frames, which stay as they are.

    Returns:
        The clean block, float32 [C, F, Y, X]. Arithmetic between the steps is float32 whatever the model's dtype.
    """
    clean = guide
    for step, sigma in enumerate(sigmas):
        noisy = pin(noise(step) if clean is None else torch.lerp(clean, noise(step), sigma), fixed)
        clean = pin(noisy - sigma * predict_flow(noisy, sigma).float(), fixed)
    assert clean is not None, "a sampler has at least one step"
    return clean


def pin(latents: Tensor, fixed: Tensor | None) -> Tensor:
    """``latents`` [C, F, Y, X] with its first frames replaced by ``fixed`` [C, f, Y, X]."""
    return latents if fixed is None else torch.cat((fixed, latents[:, fixed.shape[1] :]), dim=1)
