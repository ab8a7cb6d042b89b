"""The VAE's decoder made for GPUs: the same numbers up to rounding, from a fraction of the memory traffic.

diffusers' layers read and write a frame's activations a dozen times around each convolution: norm in float32, SiLU,
copies that put the past before them and zeros around them, and turns between layouts. Here activations stay
channels-last, and norm, SiLU, past and border are one pass into the buffer that the convolution reads::

    x --norm, SiLU--> [ past | frames, with a border ] --convolution--> x        the past: the buffer's last two frames

Knows AutoencoderKLWan's layers (diffusers 0.42). Caches between chunks are diffusers' own, so StreamingDecoder does not
notice.

Shapes: C channels, T frames of a chunk, H and W pixels high and wide of an activation.
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
    WanUpsample,
)
from torch import Tensor, nn

from longtake.engine.vae_model import to_channels_last

_PAST = 2  # frames that a convolution in time looks back
_FLOOR = 1e-24  # F.normalize's, squared


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
            forward = partial(_upsample, module)
        elif isinstance(module, WanUpsample):
            forward = partial(nn.Upsample.forward, module)  # copies pixels: exact in any type
        elif isinstance(module, WanCausalConv3d) and module.kernel_size == (1, 1, 1):
            forward = partial(_pointwise, module)
        if forward is not None:
            module.forward = forward
    return vae


def _decode(
    decoder: WanDecoder3d, x: Tensor, feat_cache: list[Any], feat_idx: list[int], first_chunk: bool = False
) -> Tensor:
    past, slot = feat_cache[feat_idx[0]], feat_idx[0]
    whole = _with_past(x, past)
    feat_cache[slot] = _last(whole)
    feat_idx[0] += 1
    x = nn.Conv3d.forward(decoder.conv_in, F.pad(whole, decoder.conv_in._padding[:4]))
    x = decoder.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
    for block in decoder.up_blocks:
        x = block(x, feat_cache=feat_cache, feat_idx=feat_idx, first_chunk=first_chunk)
    return _normed_conv(decoder.norm_out, decoder.conv_out, x, feat_cache, feat_idx)


def _residual_block(block: WanResidualBlock, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
    shortcut = block.conv_shortcut(x)
    x = _normed_conv(block.norm1, block.conv1, x, feat_cache, feat_idx)
    x = _normed_conv(block.norm2, block.conv2, x, feat_cache, feat_idx)
    return x.add_(shortcut)


def _normed_conv(
    norm: WanRMS_norm, conv: WanCausalConv3d, x: Tensor, feat_cache: list[Any], feat_idx: list[int]
) -> Tensor:
    """Norm, SiLU and a 3x3x3 convolution over the chunk and the two frames before it."""
    slot = feat_idx[0]
    _, channels, frames, height, width = x.shape
    buffer_THWC = x.new_empty((_PAST + frames, height + 2, width + 2, channels))
    for edge in (buffer_THWC[:, 0], buffer_THWC[:, -1], buffer_THWC[:, :, 0], buffer_THWC[:, :, -1]):
        edge.zero_()
    inside = buffer_THWC[:, 1:-1, 1:-1]
    past = feat_cache[slot]
    kept = 0 if past is None else past.shape[2]
    inside[: _PAST - kept].zero_()
    if kept:
        inside[_PAST - kept : _PAST].copy_(past[0].permute(1, 2, 3, 0))
    _normalise(norm, x, buffer_THWC[_PAST:])
    feat_cache[slot] = _clip(inside[-_PAST:].contiguous())
    feat_idx[0] += 1
    return nn.Conv3d.forward(conv, _clip(buffer_THWC))


def _normalise(norm: WanRMS_norm, x: Tensor, out_THWC: Tensor) -> None:
    """Norm and SiLU of [1, C, T, H, W] into the inside of [T, H + 2, W + 2, C]."""
    frames_THWC = x[0].permute(1, 2, 3, 0)
    gamma_C, scale = norm.gamma.flatten(), float(norm.scale)
    if x.is_cuda:
        from longtake.kernels.norm_silu_triton import normalise

        rows_NC = frames_THWC.contiguous().view(-1, x.shape[1])
        normalise(rows_NC, gamma_C, out_THWC, scale, _FLOOR, silu=True, frame=(x.shape[3], x.shape[4]))
        return
    wide = frames_THWC.float()
    length = wide.square().sum(-1, keepdim=True).clamp_min(_FLOOR).sqrt()
    out_THWC[:, 1:-1, 1:-1] = F.silu(wide / length * scale * gamma_C.float())


def _upsample(module: WanResample, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
    """Twice as many frames, but for a clip's first latent, and twice the size."""
    if module.mode == "upsample3d":
        slot = feat_idx[0]
        feat_idx[0] += 1
        if feat_cache[slot] is None:
            feat_cache[slot] = "Rep"
        else:
            past = feat_cache[slot]
            whole = _with_past(x, past if isinstance(past, Tensor) else None)
            feat_cache[slot] = _last(whole)
            doubled = nn.Conv3d.forward(module.time_conv, whole)[0].unflatten(0, (2, -1))  # 2, C, T, H, W
            x = _clip(doubled.permute(2, 0, 3, 4, 1).flatten(0, 1))
    frames_TCHW = x[0].transpose(0, 1)
    upsampled: Tensor = module.resample(frames_TCHW)
    return upsampled[None].transpose(1, 2)


def _pointwise(conv: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    return nn.Conv3d.forward(conv, x)


def _with_past(x: Tensor, past: Tensor | None) -> Tensor:
    """The chunk behind the two frames before it, zeros where there were none; [1, C, 2 + T, H, W] channels-last."""
    _, channels, frames, height, width = x.shape
    whole_THWC = x.new_zeros((_PAST + frames, height, width, channels))
    if past is not None:
        whole_THWC[_PAST - past.shape[2] : _PAST] = past[0].permute(1, 2, 3, 0)
    whole_THWC[_PAST:] = x[0].permute(1, 2, 3, 0)
    return _clip(whole_THWC)


def _clip(frames_THWC: Tensor) -> Tensor:
    """Frames as a clip [1, C, T, H, W], a view. The clip's own stride counts: from x[None] alone PyTorch would not
    see that the layout is channels-last, and a convolution without taps would turn it."""
    return frames_THWC[None].permute(0, 4, 1, 2, 3)


def _last(whole: Tensor) -> Tensor:
    """The last two frames, kept apart from what they are a view of."""
    return whole[:, :, -_PAST:].clone(memory_format=torch.channels_last_3d)
