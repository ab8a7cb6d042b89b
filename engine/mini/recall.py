"""What a few-step model still recalls of a true history, measured cheaply while it is distilled: in latents, without
decoding, on the same sequence and noise each time.

Shape legend: B batch, N blocks, C latent channels, F latent frames, Y, X latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# denoised(noisy, sigma_BN) -> x0, given the true history.
Denoised = Callable[[Tensor, Tensor], Tensor]


class Recall:
    """A fixed test on one true sequence.

    Args:
        clean_BCFYX: float32, the truth.
        num_blocks: N.
        sigmas: of the sampler's steps.
    """

    def __init__(self, clean_BCFYX: Tensor, num_blocks: int, sigmas: tuple[float, ...]) -> None:
        self._clean, self._num_blocks, self._sigmas = clean_BCFYX, num_blocks, sigmas
        self._noise = [torch.randn_like(clean_BCFYX) for _ in sigmas]

    @torch.no_grad()
    def __call__(self, denoised: Denoised) -> str:
        """Generate all blocks of the later half from noise, and denoise the truth at the last step's level.

        Returns:
            A line of dB (of latents of unit variance): of the blocks that are known best (a quarter, half of them: what
            was seen before), and of the last step alone.
        """
        count = (len(self._clean), self._num_blocks)
        made = self._noise[0]
        for step, (sigma, noise) in enumerate(zip(self._sigmas, self._noise, strict=True)):
            noisy = noise if step == 0 else torch.lerp(made, noise, sigma)
            made = denoised(noisy, torch.full(count, sigma, device=noise.device))
        last = torch.full(count, self._sigmas[-1], device=made.device)
        ended = denoised(torch.lerp(self._clean, self._noise[-1], self._sigmas[-1]), last)
        quarter, half = self._error(made).quantile(torch.tensor([0.25, 0.5], device=made.device))
        levels = torch.stack((quarter, half, self._error(ended).mean()))
        best, median, step_db = (-10 * torch.log10(levels)).tolist()
        return f"recall {best:.2f} dB best quarter, {median:.2f} dB median block, {step_db:.2f} dB last step alone"

    def _error(self, made: Tensor) -> Tensor:
        """Mean square error of each block of the later half, flat."""
        error: Tensor = (made - self._clean).square().unflatten(2, (self._num_blocks, -1)).mean(dim=(1, 3, 4, 5))
        return error[:, self._num_blocks // 2 :].flatten()
