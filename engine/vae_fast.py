"""The VAE's decoder made for GPUs: the same numbers up to rounding, from a fraction of the memory traffic.

diffusers' layers read and write a frame's activations a dozen times around each convolution: the convolution's bias,
norm in float32, SiLU, copies that put the past before them and zeros around them, and turns between layouts. Here
activations stay channels-last, and between two convolutions there is one pass (kernels/vae_layers.py), two where a
residual is added::

    convolution --> x --bias, norm, SiLU--> [ past | frames, with a border ] --> convolution

The convolution after an upsampling is done before it, on a quarter of the pixels, with four ninths of the work.

cuDNN has fast kernels for channels in multiples of 64. Wan2.1's 96 at full size are read as 192 of half as many pixels:
two neighbours of a row make one, and the kernel's three columns become two, a quarter of whose weights are zeros.

Knows AutoencoderKLWan's layers (diffusers 0.42). Caches between chunks are diffusers' own, so StreamingDecoder does not
notice.

Shapes: C channels, T frames of a chunk, H and W pixels high and wide of an activation, P frames of the past; clips are
[1, C, T, H, W], laid out [T, H, W, C].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanDecoder3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import Tensor, nn

from longtake.engine.vae_model import to_channels_last
from longtake.kernels.vae_layers import PAST_FRAMES, add, bordered, normed, pairs, phases, spread

_CHANNELS = 64  # that the fast kernels read at a time


def make_fast(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Rewrite a VAE's decoder in place; for inference."""
    to_channels_last(vae)
    for module in vae.decoder.modules():
        forward: Callable[..., Tensor] | None = None
        if isinstance(module, WanDecoder3d):
            forward = partial(_decode, module)
        elif isinstance(module, WanResidualBlock):
            forward = partial(_residual_block, module)
        elif isinstance(module, WanResample) and module.mode in ("upsample2d", "upsample3d"):
            module.resample[1].padding = (0, 0)  # the border is in what it reads
            module.register_buffer("phases", phases(module.resample[1].weight), persistent=False)
            forward = partial(_upsample, module)
        elif isinstance(module, WanCausalConv3d) and module.kernel_size == (1, 1, 1):
            forward = partial(_pointwise, module)
        elif isinstance(module, WanCausalConv3d) and module.kernel_size[2] == 3 and _gains_by_pairs(module.in_channels):
            module.register_buffer("pairs", pairs(module.weight), persistent=False)
        if forward is not None:
            module.forward = forward
    return vae


def _gains_by_pairs(channels: int) -> bool:
    return channels % _CHANNELS > 0 and 2 * channels % _CHANNELS == 0


def _decode(
    decoder: WanDecoder3d, x: Tensor, feat_cache: list[Any], feat_idx: list[int], first_chunk: bool = False
) -> Tensor:
    whole_THWC = _with_past(_frames(x), feat_cache, feat_idx)
    x = nn.Conv3d.forward(decoder.conv_in, _clip(F.pad(whole_THWC, (0, 0, 1, 1, 1, 1))))
    x = decoder.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
    for block in decoder.up_blocks:
        x = block(x, feat_cache=feat_cache, feat_idx=feat_idx, first_chunk=first_chunk)
    out_THWC = _normed_conv(decoder.norm_out, decoder.conv_out, _frames(x), None, feat_cache, feat_idx)
    return _clip(out_THWC + decoder.conv_out.bias)


def _residual_block(block: WanResidualBlock, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
    x_THWC = _frames(x)
    hidden = _normed_conv(block.norm1, block.conv1, x_THWC, None, feat_cache, feat_idx)
    hidden = _normed_conv(block.norm2, block.conv2, hidden, block.conv1.bias, feat_cache, feat_idx)
    bias_C, shortcut = block.conv2.bias, block.conv_shortcut
    if isinstance(shortcut, WanCausalConv3d):
        x_THWC, bias_C = _convolve(shortcut, x_THWC), bias_C.float() + shortcut.bias.float()
    add(hidden.flatten(0, 2), bias_C, x_THWC.flatten(0, 2))
    return _clip(hidden)


def _normed_conv(
    norm: WanRMS_norm,
    conv: WanCausalConv3d,
    x_THWC: Tensor,
    bias_C: Tensor | None,
    feat_cache: list[Any],
    feat_idx: list[int],
) -> Tensor:
    """Bias, norm, SiLU and a 3x3x3 convolution, without its bias, over the chunk and the two frames before it."""
    slot = feat_idx[0]
    feat_idx[0] += 1
    past_PHWC = _past(feat_cache[slot], x_THWC)
    buffer, last_PHWC = normed(x_THWC, bias_C, norm.gamma.flatten(), float(norm.scale), past_PHWC)
    feat_cache[slot] = _clip(last_PHWC)
    return _convolve(conv, buffer)


def _upsample(module: WanResample, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
    """Twice as many frames, but for a clip's first latent, and twice the size."""
    x_THWKC, bias_KC, conv = _frames(x)[:, :, :, None], None, module.resample[1]
    if module.mode == "upsample3d" and feat_cache[feat_idx[0]] is None:
        feat_cache[feat_idx[0]] = "Rep"
        feat_idx[0] += 1
    elif module.mode == "upsample3d":
        doubled = _convolve(module.time_conv, _with_past(x_THWKC[:, :, :, 0], feat_cache, feat_idx))
        x_THWKC, bias_KC = doubled.unflatten(-1, (2, -1)), module.time_conv.bias.unflatten(0, (2, -1))
    buffer = bordered(x_THWKC, bias_KC)
    y_TCHW = conv._conv_forward(buffer.permute(0, 3, 1, 2), module.phases, None)
    y_THWQC = y_TCHW.permute(0, 2, 3, 1).contiguous().unflatten(-1, (4, -1))
    return _clip(spread(y_THWQC, conv.bias))


def _pointwise(conv: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    return nn.Conv3d.forward(conv, x)


def _convolve(conv: WanCausalConv3d, frames_THWC: Tensor) -> Tensor:
    """Without bias: PyTorch would add it in a pass of its own, a slow one."""
    weight: Tensor | None = getattr(conv, "pairs", None)
    if weight is None or frames_THWC.shape[2] % 2:
        return _frames(conv._conv_forward(_clip(frames_THWC), conv.weight, None))
    in_pairs = frames_THWC.unflatten(2, (-1, 2)).flatten(3)
    made = _frames(conv._conv_forward(_clip(in_pairs), weight, None))
    columns: Tensor = made.unflatten(3, (2, -1)).flatten(2, 3)
    return columns


def _with_past(x_THWC: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
    """The chunk behind the two frames before it; keeps the last two for the next."""
    slot = feat_idx[0]
    feat_idx[0] += 1
    whole_THWC = torch.cat((_past(feat_cache[slot], x_THWC), x_THWC))
    feat_cache[slot] = _clip(whole_THWC[-PAST_FRAMES:].clone())
    return whole_THWC


def _past(cached: Any, x_THWC: Tensor) -> Tensor:
    """[P, H, W, C] before the chunk: what is cached, which is one frame in diffusers' own after a clip's first, and
    zeros before the clip."""
    frames = _frames(cached) if isinstance(cached, Tensor) else x_THWC[:0]
    missing = PAST_FRAMES - len(frames)
    return F.pad(frames, (0, 0, 0, 0, 0, 0, missing, 0)) if missing else frames


def _frames(clip: Tensor) -> Tensor:
    """[T, H, W, C] contiguous: a view where the clip is channels-last."""
    return clip[0].permute(1, 2, 3, 0).contiguous()


def _clip(frames_THWC: Tensor) -> Tensor:
    """Frames as a clip [1, C, T, H, W], a view. The clip's own stride counts: from x[None] alone PyTorch would not
    see that the layout is channels-last, and a convolution without taps would turn it."""
    return frames_THWC[None].permute(0, 4, 1, 2, 3)
