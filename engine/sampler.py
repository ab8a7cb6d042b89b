"""The few-step sampler of the Self-Forcing family (arXiv 2506.08009): predict the clean block, re-noise, repeat.

With ``x_t = (1 - sigma) * x0 + sigma * noise`` the model predicts the flow ``noise - x0``, hence
``x0 = x_t - sigma * flow``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longtake.engine.config import SamplerConfig


def shifted_sigmas(config: SamplerConfig) -> tuple[float, ...]:
    """Noise levels of the denoising steps: ``shift * s / (1 + (shift - 1) * s)`` of each ``step / 1000``.

    Returns:
        One sigma in (0, 1] a step; 1000, 750, 500, 250 with shift 5 give 1, 0.9375, 0.8333, 0.625.
    """
    return tuple(config.shift * (step / 1000) / (1 + (config.shift - 1) * (step / 1000)) for step in config.timesteps)


def denoise(
    predict_flow: Callable[[Tensor, float], Tensor],
    noise: Callable[[int], Tensor],
    sigmas: tuple[float, ...],
) -> Tensor:
    """Run the denoising steps of one block.

    Args:
        predict_flow: (noisy latents [C, F, Y, X], sigma) -> flow of the same shape.
        noise: step -> fresh float32 noise [C, F, Y, X] on the device of the latents.
        sigmas: from :func:`shifted_sigmas`.

    Returns:
        The clean block, float32 [C, F, Y, X]. Arithmetic between the steps is float32 whatever the model's dtype.
    """
    clean: Tensor | None = None
    for step, sigma in enumerate(sigmas):
        noisy = noise(step) if clean is None else torch.lerp(clean, noise(step), sigma)
        clean = noisy - sigma * predict_flow(noisy, sigma).float()
    assert clean is not None, "a sampler has at least one step"
    return clean
