"""mini's AutoencoderKLWan: its size, and its whole-clip forward for training and for encoding in bulk.

diffusers runs the class chunk by chunk with a cache for each convolution. All its layers are causal, so one pass over
the whole clip gives the same numbers, if the first frame is handled as the chunked code does: the time resamplings let
it through.
`ClipForward` is that pass (tests compare it with the class's own `encode` and `decode`).

Shapes: B clips, T frames, F = 1 + (T - 1) / 4 latent frames, C channels, H and W the rows and columns of that layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    patchify,
    unpatchify,
)
from torch import Tensor

from .norm_silu import fused_norm_silu, norm_silu

CONFIG: dict[str, Any] = {
    "base_dim": 12,
    "decoder_base_dim": 16,
    "z_dim": 16,
    "dim_mult": [2, 2, 3],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
CONVOLUTIONS = ("conv2d", "conv3d", "conv3d channels last")


def new_autoencoder(config: dict[str, Any] | None = None) -> AutoencoderKLWan:
    """Make the model with fresh weights."""
    return AutoencoderKLWan(**(config or CONFIG))


class ClipForward:
    """The whole-clip forward of an AutoencoderKLWan of the 2.1 kind (no residual resampling).

    Args:
        vae: the model; its parameters are read at every call, so it can be trained.
        convolution: how a causal 3D convolution is computed, one of CONVOLUTIONS: a 2D one over stacked frames, the 3D
            one, or that in channels-last layout. The results differ by rounding alone.
        fuse: norm and activation in one kernel (Triton, CUDA).
    """

    def __init__(self, vae: AutoencoderKLWan, *, convolution: str = "conv2d", fuse: bool = False) -> None:
        if convolution not in CONVOLUTIONS:
            raise ValueError(f"convolution {convolution!r} is none of {CONVOLUTIONS}")
        self.vae = vae
        self.convolution = convolution
        self._norm_silu: Callable[[Tensor, Tensor, float], Tensor] = fused_norm_silu if fuse else norm_silu

    def encode(self, video_B3THW: Tensor) -> Tensor:
        """Give the posterior's parameters.

        Args:
            video_B3THW: float, in [-1, 1], T = 1 + 4n frames.

        Returns:
            [B, 2 * z_dim, F, H/8, W/8]: mean, then log variance.
        """
        encoder = self.vae.encoder
        x = self._layout(self._patchify(video_B3THW))
        x = self._conv(encoder.conv_in, x)
        for layer in encoder.down_blocks:
            x = self._layer(layer, x)
        x = self._middle(encoder.mid_block, x)
        x = self._conv(encoder.conv_out, self._activate(encoder.norm_out, x))
        return self._conv(self.vae.quant_conv, x)

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Give the video of latents (not normalised), not clamped: [B, 3, T, 8H, 8W]."""
        decoder = self.vae.decoder
        x = self._conv(self.vae.post_quant_conv, self._layout(latents_BCFHW))
        x = self._conv(decoder.conv_in, x)
        x = self._middle(decoder.mid_block, x)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._residual(resnet, x)
            if block.upsamplers is not None:
                x = self._resample(block.upsamplers[0], x)
        x = self._conv(decoder.conv_out, self._activate(decoder.norm_out, x))
        size = self.vae.config.patch_size
        return x if size is None else unpatchify(x, patch_size=size)

    def _patchify(self, video: Tensor) -> Tensor:
        size = self.vae.config.patch_size
        return video if size is None else patchify(video, patch_size=size)

    def _layout(self, x: Tensor) -> Tensor:
        return x if self.convolution == "conv3d" else x.contiguous(memory_format=torch.channels_last_3d)

    def _conv(self, conv: WanCausalConv3d, x: Tensor) -> Tensor:
        """Apply a causal convolution to a whole clip, zeros before its first frame."""
        before = conv._padding[4]
        if self.convolution != "conv2d":
            return functional.conv3d(
                functional.pad(x, conv._padding), self._layout(conv.weight), conv.bias, stride=conv.stride
            )
        batch, channels, _, height, width = x.shape
        out_channels, _, taps, rows, columns = conv.weight.shape
        if before:
            x = torch.cat([x.new_zeros(batch, channels, before, height, width), x], 2)
        count = (x.shape[2] - taps) // conv.stride[0] + 1
        last = (count - 1) * conv.stride[0] + 1
        shifted = [x[:, :, tap : tap + last : conv.stride[0]].transpose(1, 2) for tap in range(taps)]
        stacked = torch.cat(shifted, 2).reshape(batch * count, taps * channels, height, width)
        weight = conv.weight.transpose(1, 2).reshape(out_channels, taps * channels, rows, columns)
        out = functional.conv2d(
            stacked.contiguous(memory_format=torch.channels_last),
            weight.contiguous(memory_format=torch.channels_last),
            conv.bias,
            padding=(conv._padding[2], conv._padding[0]),
        )
        return out.view(batch, count, out_channels, height, width).transpose(1, 2)

    def _activate(self, norm: Any, x: Tensor) -> Tensor:
        return self._norm_silu(x, norm.gamma, float(norm.scale))

    def _residual(self, block: WanResidualBlock, x: Tensor) -> Tensor:
        same = isinstance(block.conv_shortcut, torch.nn.Identity)
        short = x if same else self._conv(block.conv_shortcut, x)
        x = self._conv(block.conv1, self._activate(block.norm1, x))
        return self._conv(block.conv2, self._activate(block.norm2, x)) + short

    def _middle(self, block: Any, x: Tensor) -> Tensor:
        x = self._residual(block.resnets[0], x)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            x = self._residual(resnet, attention(x))
        return x

    def _layer(self, layer: torch.nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, WanResidualBlock):
            return self._residual(layer, x)
        if isinstance(layer, WanAttentionBlock):
            return Tensor(layer(x))
        if isinstance(layer, WanResample):
            return self._resample(layer, x)
        raise TypeError(f"a {type(layer).__name__} has no whole-clip forward here")

    def _resample(self, layer: WanResample, x: Tensor) -> Tensor:
        if layer.mode == "upsample3d" and x.shape[2] > 1:
            later = self._conv(layer.time_conv, x[:, :, 1:])
            batch, doubled, frames, height, width = later.shape
            later = later.reshape(batch, 2, doubled // 2, frames, height, width)
            later = later.permute(0, 2, 3, 1, 4, 5).reshape(batch, doubled // 2, 2 * frames, height, width)
            x = torch.cat([x[:, :, :1], later], 2)
        batch, channels, frames, height, width = x.shape
        flat = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
        if layer.mode.startswith("upsample"):
            flat = functional.interpolate(flat, scale_factor=2.0, mode="nearest-exact")
            flat = layer.resample[1](flat)
        else:
            flat = layer.resample(flat)
        x = flat.view(batch, frames, *flat.shape[1:]).transpose(1, 2)
        if layer.mode == "downsample3d" and frames > 1:
            x = torch.cat([x[:, :, :1], self._conv(layer.time_conv, x)], 2)
        return x


def statistics(vae: AutoencoderKLWan, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return the latents' mean and standard deviation by channel, float32 [C, 1, 1, 1]."""
    mean = torch.tensor(vae.config.latents_mean, device=device).view(-1, 1, 1, 1)
    return mean, torch.tensor(vae.config.latents_std, device=device).view(-1, 1, 1, 1)


@torch.no_grad()
def encode_clips(forward: ClipForward, video_BT3HW: Tensor, *, frames_at_once: int = 2048) -> Tensor:
    """Encode rendered clips in bulk.

    Args:
        forward: the model's whole-clip forward.
        video_BT3HW: float in [0, 1], T = 1 + 4n.
        frames_at_once: bounds the memory in use; clips are never cut.

    Returns:
        float32 normalised latents [B, C, F, H/8, W/8]: the posterior's mean.
    """
    mean, std = statistics(forward.vae, video_BT3HW.device)
    dtype = next(forward.vae.parameters()).dtype
    out = []
    for clips in video_BT3HW.split(max(1, frames_at_once // video_BT3HW.shape[1])):
        moments = forward.encode((clips.transpose(1, 2) * 2 - 1).to(dtype))
        out.append((moments[:, : len(mean)].float() - mean) / std)
    return torch.cat(out)
