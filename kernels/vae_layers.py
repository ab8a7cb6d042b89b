"""What lies between the convolutions of Wan's VAE decoder, each one pass over memory: plain, and in Triton on a GPU.

Convolutions run without their bias, as a pass of its own is what cuDNN makes of it, and without padding: what comes
next adds the bias, and what comes before writes zeros around the frames::

    x --bias, norm, SiLU--> [ past | frames, with a border ]        a buffer that a 3x3x3 convolution reads
                            [ last two frames ]                     the past of the next chunk
    x --bias--> [ frames, with a border ]                           a buffer that a convolution in space reads
    x + bias + residual --> x

The 3x3 convolution after an upsampling reads each pixel four times. Of nine taps, those that fall on one pixel of the
image before are one tap with their sum: four pixels are four sets of 2x2 taps, "phases", of one convolution there::

    rows    2y-1  2y  2y+1  2y+2        phase 0 (row 2y):    w0 on row y-1, w1 + w2 on row y
    before   y-1   y     y   y+1        phase 1 (row 2y+1):  w0 + w1 on row y, w2 on row y+1

Shape legend: T frames of a chunk, H and W pixels high and wide, C channels (contiguous), O those that a convolution
makes; P = 2 frames that a convolution looks back; K frames that share a pixel's channels, where a convolution made K
frames of each; Q = 4 phases.
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


def bordered(x_THWKC: Tensor, bias_KC: Tensor | None) -> Tensor:
    """Frames within a border of zeros.

    Args:
        x_THWKC: contiguous; frame t of the result is [t // K, :, :, t % K].
        bias_KC: added first; None for none.

    Returns:
        [T * K, H + 2, W + 2, C] of the same type.
    """
    frames, height, width, parts, channels = x_THWKC.shape
    if x_THWKC.is_cuda:
        from longtake.kernels.vae_layers_triton import bordered as launch

        buffer = x_THWKC.new_empty((frames * parts, height + 2, width + 2, channels))
        launch(x_THWKC, bias_KC, buffer)
        return buffer
    total = x_THWKC if bias_KC is None else (x_THWKC.float() + bias_KC.float()).to(x_THWKC.dtype)
    return _bordered(total.permute(0, 3, 1, 2, 4).flatten(0, 1))


def phases(weight_OCyx: Tensor) -> Tensor:
    """Weights [4 * O, C, 2, 2] that do with the image before an upsampling what those, 3x3, do after it.

    Applied to frames with a border; see `spread`. Sums are taken in float32 and rounded once.
    """
    sums = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=weight_OCyx.device).float()
    weight = torch.einsum("aed,bfg,ocdg->abocef", sums, sums, weight_OCyx.float())
    return weight.flatten(0, 2).to(weight_OCyx.dtype).contiguous(memory_format=torch.channels_last)


def pairs(weight_OCtyx: Tensor) -> Tensor:
    """Weights [2 * O, 2 * C, t, y, 2] that do with pairs of columns what those, with three columns, do with columns.

    A pair's channels are those of one column and the next: column d of three, of output 2 j + r, reads input
    2 j + r + d, which is half (r + d) % 2 of pair j + (r + d) // 2. A quarter of the weights are zeros.
    """
    out_channels, in_channels, taps_t, taps_y, columns = weight_OCtyx.shape
    weight = weight_OCtyx.new_zeros((2, out_channels, 2, in_channels, taps_t, taps_y, 2))
    for half_out in range(2):
        for column in range(columns):
            pair, half_in = divmod(half_out + column, 2)
            weight[half_out, :, half_in, :, :, :, pair] = weight_OCtyx[..., column]
    return weight.flatten(2, 3).flatten(0, 1).contiguous(memory_format=torch.channels_last_3d)


def spread(x_THWQC: Tensor, bias_C: Tensor) -> Tensor:
    """Put the four phases of a pixel side by side, and add the bias.

    Args:
        x_THWQC: [T, H + 1, W + 1, 4, C] contiguous, what a convolution with `phases` gives.
        bias_C: of the convolution.

    Returns:
        [T, 2 * H, 2 * W, C] of the same type: phase (a, b) of pixel (y, x) is [y + a, x + b, 2 * a + b].
    """
    frames, height, width, _, channels = x_THWQC.shape
    height, width = height - 1, width - 1
    if x_THWQC.is_cuda:
        from longtake.kernels.vae_layers_triton import spread as launch

        out = x_THWQC.new_empty((frames, 2 * height, 2 * width, channels))
        launch(x_THWQC, bias_C, out)
        return out
    rows = [
        torch.stack([x_THWQC[:, a : a + height, b : b + width, 2 * a + b] for b in range(2)], dim=3) for a in range(2)
    ]
    whole = torch.stack(rows, dim=2).flatten(3, 4).flatten(1, 2)
    return (whole.float() + bias_C.float()).to(x_THWQC.dtype)


def add(x_NC: Tensor, bias_C: Tensor, residual_NC: Tensor) -> None:
    """x += bias + residual, in place, rounded once; both x and residual contiguous."""
    if x_NC.is_cuda:
        from longtake.kernels.vae_layers_triton import add as launch

        launch(x_NC, bias_C, residual_NC)
        return
    x_NC.copy_(x_NC.float() + bias_C.float() + residual_NC.float())


def _bordered(frames_THWC: Tensor) -> Tensor:
    return F.pad(frames_THWC, (0, 0, 1, 1, 1, 1))
