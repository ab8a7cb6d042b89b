"""Streaming encode and decode over diffusers' AutoencoderKLWan: any split of a clip gives the bits of the whole clip.

The class has no public streaming API: its `decode` and `encode` loop over latents with a private list of convolution
caches. This file, and vae_fast.py of the decoder's layers, know that protocol (diffusers 0.42.1; pyproject.toml pins
the minor version, and the constructors check what they rely on):

    decoder(x[:, :, i : i + 1], feat_cache=list, feat_idx=[0], first_chunk=i == 0)
    encoder(video[:, :, chunk], feat_cache=list, feat_idx=[0])          chunks of 1, 4, 4, 4, ... frames
    list entries: None, then a tensor; in the decoder's time upsampling None, then "Rep", then a tensor

Every latent is one call of one shape, so the split never matters, on any device; tiling and slicing switches of the
model are ignored. `vae.decode` differs in one thing: it runs the pointwise post_quant_conv on all latents at once. The
bits are the same wherever that layer's do not depend on the number of frames: on one CPU thread, for latents of 8 or
more positions. With several threads, or on a GPU, a library may sum in another order for a long clip (1e-6).

Shapes: C latent channels, F latent frames, H and W latent height and width; N video frames, Y and X pixels high and
wide.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, patchify, unpatchify
from torch import Tensor

from longtake.engine.vae_model import (
    denormalise,
    from_uint8,
    load_vae,
    normalise,
    spatial_stride,
    temporal_stride,
    to_channels_last,
    to_uint8,
)
from longtake.kernels.errors import ConfigError

__all__ = [
    "StreamingDecoder",
    "StreamingEncoder",
    "decoder_state_bytes",
    "denormalise",
    "from_uint8",
    "load_vae",
    "normalise",
    "receptive_latents",
    "spatial_stride",
    "temporal_stride",
    "to_channels_last",
    "to_uint8",
]

ENCODER_CHUNK_FRAMES = 4  # fixed in AutoencoderKLWan._encode, whatever the configuration
_Slot = Tensor | str | None


def receptive_latents(vae: AutoencoderKLWan) -> int:
    """Latents after which a decoder's state no longer depends on anything before them.

    Warming a fresh decoder up with the last `receptive_latents(vae)` latents of a clip gives, bit for bit, the state
    it had at the clip's end: a checkpoint may keep those latents (megabytes) instead of the caches (gigabytes at
    480p, see `decoder_state_bytes`).

    Walks the decoder from its end: each temporal convolution reaches two frames back, each time upsampling halves the
    index. One latent more because the first one fed is decoded as a clip's first.
    """
    modules = list(vae.decoder.modules())
    earliest = 0
    for module in reversed(_in_time_order(modules)):
        if isinstance(module, WanResample):
            earliest = math.floor(earliest / 2) - 2
        else:
            earliest -= 2
    return 1 - earliest


def decoder_state_bytes(vae: AutoencoderKLWan, height: int, width: int) -> int:
    """Bytes of a running decoder's state for latents of this height and width; on the meta device, so at no cost."""
    twin = StreamingDecoder(_meta_twin(vae))
    for _ in range(3):
        twin.warm_up(torch.empty(vae.config.z_dim, 1, height, width, device="meta"))
    return twin.state_bytes


def _in_time_order(modules: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Convolutions that look back and time upsamplings, in the order they run, which is that of their registration."""
    inside_resample = {id(m.time_conv) for m in modules if isinstance(m, WanResample) and m.mode == "upsample3d"}
    order: list[torch.nn.Module] = []
    for module in modules:
        if isinstance(module, WanCausalConv3d):
            if module.kernel_size[0] > 1 and id(module) not in inside_resample:
                order.append(module)
        elif isinstance(module, WanResample) and module.mode == "upsample3d":
            order.append(module)
    return order


def _meta_twin(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    with torch.device("meta"):
        twin: AutoencoderKLWan = AutoencoderKLWan.from_config(vae.config)
    return torch.nn.Module.to(twin, vae.dtype).eval()  # past the override, which warns of a cast that is meant


class _Streaming:
    """The caches of one half of the VAE and what must be known to go on; owned by one thread, one clip at a time."""

    def __init__(self, vae: AutoencoderKLWan, half: str) -> None:
        counts: Any = getattr(vae, "_cached_conv_counts", None)
        if not isinstance(counts, dict) or half not in counts:
            raise ConfigError("this diffusers is not the one longtake streams with: install diffusers 0.42")
        self.vae = vae
        self._num_slots = int(counts[half])
        self._slots: list[_Slot] = [None] * self._num_slots
        self._size: tuple[int, int] | None = None
        self._count = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole VAE, with what `make_fast` keeps beside its weights."""
        return sum(tensor.nbytes for tensor in (*self.vae.parameters(), *self.vae.buffers()))

    @property
    def state_bytes(self) -> int:
        """Bytes of the tensors held now: constant from the third latent on, whatever the clip's length."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def reset(self) -> None:
        """Forget the clip: the next input is a clip's first."""
        self._slots = [None] * self._num_slots
        self._size = None
        self._count = 0

    def _tensors(self) -> Iterator[Tensor]:
        return (slot for slot in self._slots if isinstance(slot, Tensor))

    @contextlib.contextmanager
    def _chunk(self) -> Iterator[list[_Slot]]:
        """The slots, for a chunk to replace each as soon as it was read: old and new state are never held both.
        What raises on the way loses the clip, as `reset` does."""
        slots, self._slots = self._slots, []
        try:
            yield slots
        except BaseException:
            self.reset()
            raise
        # a part of a larger tensor would keep all of that
        for index, slot in enumerate(slots):
            if isinstance(slot, Tensor) and not _is_dense(slot):
                slots[index] = slot.contiguous()
        self._slots = slots

    def _check_size(self, height: int, width: int) -> None:
        if self._size is None:
            self._size = (height, width)
        elif self._size != (height, width):
            raise ConfigError(
                f"the clip is {self._size[0]}x{self._size[1]}, not {height}x{width}: reset() starts another"
            )


class StreamingDecoder(_Streaming):
    """Decodes a clip latent by latent; equal, bit for bit, to `vae.decode` on the whole clip, and flat in memory.

    Args:
        vae: its weights are only read; several decoders may share one.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__(vae, "decoder")

    def decode(self, latents_CFHW: Tensor) -> Tensor:
        """Decode the clip's next latents.

        Args:
            latents_CFHW: normalised latents, any float dtype and device; F >= 1.

        Returns: uint8 RGB frames [N, Y, X, 3] on the VAE's device (see `to_uint8`); the first latent of a clip gives
        one, every other `temporal_stride`.

        Raises:
            ConfigError: the shape does not fit the VAE or the clip so far.
        """
        return torch.cat([to_uint8(video_3NYX) for video_3NYX in self.pieces(latents_CFHW)])

    def warm_up(self, latents_CFHW: Tensor) -> None:
        """Feed latents whose frames exist already and drop the frames: a shot continues another, or a machine was lost.

        With at least `receptive_latents(vae)` latents the state afterwards is that of a decoder which saw the whole
        clip.
        """
        for _ in self.pieces(latents_CFHW):
            pass

    @torch.no_grad()
    def pieces(self, latents_CFHW: Tensor) -> Iterator[Tensor]:
        """As `decode`, but of each latent what `vae.decode` gives: [3, N, Y, X] in [-1, 1], in the VAE's dtype."""
        vae = self.vae
        if latents_CFHW.dim() != 4 or latents_CFHW.shape[0] != vae.config.z_dim or latents_CFHW.shape[1] < 1:
            raise ConfigError(
                f"latents must be [{vae.config.z_dim}, F >= 1, H, W], not {list(latents_CFHW.shape)}: no batch"
            )
        self._check_size(latents_CFHW.shape[2], latents_CFHW.shape[3])
        latents_CFHW = denormalise(latents_CFHW.to(vae.device), vae)
        for latent_CHW in latents_CFHW.unbind(dim=1):
            yield self._decode_latent(latent_CHW[None, :, None])

    def _decode_latent(self, latent_1C1HW: Tensor) -> Tensor:
        vae = self.vae
        hidden = vae.post_quant_conv(latent_1C1HW.contiguous())
        with self._chunk() as slots:
            video = vae.decoder(hidden, feat_cache=slots, feat_idx=[0], first_chunk=self._count == 0)
        self._count += 1
        if vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=vae.config.patch_size)
        return torch.clamp(video, min=-1.0, max=1.0)[0]


class StreamingEncoder(_Streaming):
    """Encodes a clip as its frames come; the bits of `vae.encode(video).latent_dist.mode()`, then normalised.

    The first frame gives a latent by itself; after it frames are taken four at a time, and up to three wait for the
    next call (`vae.encode` drops such a rest).
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__(vae, "encoder")
        self._pending_3NYX: Tensor | None = None

    def encode(self, frames_NYX3: Tensor) -> Tensor:
        """Encode the clip's next frames.

        Args:
            frames_NYX3: uint8 RGB; an image is a clip of one frame.

        Returns: normalised latents, float32 [C, F, H, W] on the VAE's device; F may be 0.

        Raises:
            ConfigError: the shape does not fit the VAE or the clip so far.
        """
        if frames_NYX3.dim() != 4 or frames_NYX3.shape[3] != 3 or frames_NYX3.dtype != torch.uint8:
            raise ConfigError(
                f"frames must be uint8 [N, height, width, 3], not {frames_NYX3.dtype} {list(frames_NYX3.shape)}"
            )
        return self.encode_float(from_uint8(frames_NYX3.to(self.vae.device)))

    @torch.no_grad()
    def encode_float(self, video_3NYX: Tensor) -> Tensor:
        """As `encode`, from float video [3, N, Y, X] in [-1, 1]."""
        self._check_video(video_3NYX)
        video_3NYX = video_3NYX.to(device=self.vae.device, dtype=self.vae.dtype)
        if self._pending_3NYX is not None:
            video_3NYX = torch.cat([self._pending_3NYX, video_3NYX], dim=1)
        latents: list[Tensor] = []
        while video_3NYX.shape[1] >= (needed := ENCODER_CHUNK_FRAMES if self._count else 1):
            latents.append(self._encode_chunk(video_3NYX[None, :, :needed]))
            video_3NYX = video_3NYX[:, needed:]
        pending_3NYX = video_3NYX.clone(memory_format=torch.contiguous_format)
        self._pending_3NYX = pending_3NYX if pending_3NYX.shape[1] else None
        if not latents:
            stride = spatial_stride(self.vae)
            size = (video_3NYX.shape[2] // stride, video_3NYX.shape[3] // stride)
            return torch.empty((self.vae.config.z_dim, 0, *size), dtype=torch.float32, device=self.vae.device)
        return normalise(torch.cat(latents, dim=1), self.vae)

    def reset(self) -> None:
        super().reset()
        self._pending_3NYX = None

    def _tensors(self) -> Iterator[Tensor]:
        yield from super()._tensors()
        if self._pending_3NYX is not None:
            yield self._pending_3NYX

    def _check_video(self, video_3NYX: Tensor) -> None:
        stride = spatial_stride(self.vae)
        if video_3NYX.dim() != 4 or video_3NYX.shape[0] != 3 or video_3NYX.shape[1] < 1:
            raise ConfigError(
                f"video must be [3, N >= 1, height, width], not {list(video_3NYX.shape)}: one clip, no batch"
            )
        height, width = video_3NYX.shape[2:]
        if height % stride or width % stride:
            raise ConfigError(
                f"frames of {width}x{height} do not divide by the VAE's {stride} pixels a latent: crop or scale them"
            )
        self._check_size(height, width)

    def _encode_chunk(self, video_13NYX: Tensor) -> Tensor:
        vae = self.vae
        video_13NYX = video_13NYX.contiguous()
        if vae.config.patch_size is not None:
            video_13NYX = patchify(video_13NYX, patch_size=vae.config.patch_size)
        with self._chunk() as slots:
            encoded = vae.encoder(video_13NYX, feat_cache=slots, feat_idx=[0])
        mean_CFHW: Tensor = vae.quant_conv(encoded)[0].chunk(2, dim=0)[0]
        self._count += mean_CFHW.shape[1]
        return mean_CFHW


def _is_dense(slot: Tensor) -> bool:
    return slot.is_contiguous() or slot.is_contiguous(memory_format=torch.channels_last_3d)
