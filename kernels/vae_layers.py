"""What lies between the convolutions of Wan's VAE decoder, each one pass over memory: plain, and in Triton on a GPU.

Convolutions run without their bias, as a pass of its own is what cuDNN makes of it, and without padding: what comes
next adds the bias, and what comes before writes zeros around the frames::

    x --bias, norm, SiLU--> [ past | frames, with a border ]        a buffer that a 3x3x3 convolution reads
                            [ last two frames ]                     the past of the next chunk
    x --bias, twice as high and wide--> [ frames, with a border ]   a buffer that a 3x3 convolution reads
    x + bias + residual --> x

Shape legend: T frames of a chunk, H and W pixels high and wide, C channels (contiguous); P = 2 frames that a
convolution looks back; K frames that share a pixel's channels, where a convolution made K frames of each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PAST_FRAMES = 2
FLOOR = 1e-24  # F.normalize's, squared


def normed(
    x_THWC: Tensor, bias_C: Tensor | None, gamma_C: Tensor, scale: float, past_PHWC: Tensor
) -> tuple[Tensor, Tensor]:
    """SiLU of the RMS norm over channels, between what came before and a border of zeros.

    Args:
        x_THWC: contiguous, any float type, which is that of the results.
        bias_C: added first; None for none.
        gamma_C: multiplies what is normalised.
        scale: length of the norm: the square root of C in Wan.
        past_PHWC: the second result of the chunk before, contiguous; zeros at first.

    Returns:
        The buffer [P + T, H + 2, W + 2, C], and its last P frames without their border.
    """
    frames, height, width, channels = x_THWC.shape
    if x_THWC.is_cuda:
        from longtake.kernels.vae_layers_triton import normed as launch

        buffer = x_THWC.new_empty((PAST_FRAMES + frames, height + 2, width + 2, channels))
        last_PHWC = x_THWC.new_empty((PAST_FRAMES, height, width, channels))
        launch(x_THWC, bias_C, gamma_C, scale, past_PHWC, buffer, last_PHWC)
        return buffer, last_PHWC
    wide = x_THWC.float() if bias_C is None else x_THWC.float() + bias_C.float()
    length = wide.square().sum(-1, keepdim=True).clamp_min(FLOOR).sqrt()
    active = F.silu(wide / length * scale * gamma_C.float()).to(x_THWC.dtype)
    whole = torch.cat((past_PHWC, active))
    return _bordered(whole), whole[-PAST_FRAMES:].clone()


def upsampled(x_THWKC: Tensor, bias_KC: Tensor | None) -> Tensor:
    """Twice the size, each pixel four times, within a border of zeros.

    Args:
        x_THWKC: contiguous; frame t of the result is [t // K, :, :, t % K].
        bias_KC: added first; None for none.

    Returns:
        [T * K, 2 * H + 2, 2 * W + 2, C] of the same type.
    """
    frames, height, width, parts, channels = x_THWKC.shape
    if x_THWKC.is_cuda:
        from longtake.kernels.vae_layers_triton import upsampled as launch

        buffer = x_THWKC.new_empty((frames * parts, 2 * height + 2, 2 * width + 2, channels))
        launch(x_THWKC, bias_KC, buffer)
        return buffer
    total = x_THWKC if bias_KC is None else (x_THWKC.float() + bias_KC.float()).to(x_THWKC.dtype)
    inside = total.permute(0, 3, 1, 2, 4).flatten(0, 1).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return _bordered(inside)


def add(x_NC: Tensor, bias_C: Tensor, residual_NC: Tensor | None = None) -> None:
    """x += bias + residual, in place, rounded once; both x and residual contiguous."""
    if x_NC.is_cuda:
        from longtake.kernels.vae_layers_triton import add as launch

        launch(x_NC, bias_C, residual_NC)
        return
    total = x_NC.float() + bias_C.float()
    x_NC.copy_(total if residual_NC is None else total + residual_NC.float())


def _bordered(frames_THWC: Tensor) -> Tensor:
    return F.pad(frames_THWC, (0, 0, 1, 1, 1, 1))
