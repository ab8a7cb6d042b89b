"""The VAE as a model: loading it, its strides, and what lies between its numbers, the transformer's latents and pixels.

Shapes: C latent channels, F latent frames, H and W latent height and width; N video frames, Y and X pixels high and
wide.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longtake.kernels.errors import ConfigError, StorageError


def load_vae(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> AutoencoderKLWan:
    """Load a VAE, frozen and in evaluation mode; never touches the network.

    Args:
        folder: a model folder in the hub's layout, with the VAE in vae/, or that folder itself.
        dtype: floating-point type of weights and caches.
        device: where it runs.

    Raises:
        ConfigError: there is no VAE in the folder.
        StorageError: its files are missing or corrupt.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        path = path / "vae"
    if not (path / "config.json").is_file():
        raise ConfigError("no VAE here: a model folder holds vae/config.json and its safetensors", path=folder)
    try:
        vae, report = AutoencoderKLWan.from_pretrained(
            str(path), torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise StorageError(f"the VAE does not load, copy the folder again: {error}", path=path) from error
    if report["missing_keys"]:
        raise StorageError(f"the VAE's file lacks weights, {report['missing_keys'][0]} for one", path=path)
    vae = vae.to(device).eval().requires_grad_(False)
    assert isinstance(vae, AutoencoderKLWan)
    return vae


def to_channels_last(vae: AutoencoderKLWan) -> None:
    """Lay the weights of a VAE's convolutions out channels-last, in place, and with them everything computed."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])


def temporal_stride(vae: AutoencoderKLWan) -> int:
    """Video frames for each latent frame after the first."""
    return int(2 ** sum(map(bool, vae.config.temperal_downsample)))


def spatial_stride(vae: AutoencoderKLWan) -> int:
    """Pixels for each latent row or column: counted in the layers, as scale_factor_spatial may disagree with them."""
    return int(2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1))


def normalise(latents_CFHW: Tensor, vae: AutoencoderKLWan) -> Tensor:
    """The VAE's latents to the transformer's: (x - latents_mean) / latents_std a channel, in float32."""
    mean_C111, std_C111 = _statistics(vae, latents_CFHW.device)
    return (latents_CFHW.float() - mean_C111) / std_C111


def denormalise(latents_CFHW: Tensor, vae: AutoencoderKLWan) -> Tensor:
    """The transformer's latents to the VAE's: x * latents_std + latents_mean in float32, then the VAE's dtype."""
    mean_C111, std_C111 = _statistics(vae, latents_CFHW.device)
    return (latents_CFHW.float() * std_C111 + mean_C111).to(vae.dtype)


def to_uint8(video_3NYX: Tensor) -> Tensor:
    """Float video in [-1, 1] to frames: (x / 2 + 0.5) * 255 in float32, clamped to [0, 255], rounded half to even.

    Returns: uint8 [N, Y, X, 3] RGB, contiguous, same device.
    """
    scaled_3NYX = ((video_3NYX.float() / 2 + 0.5) * 255).clamp_(0, 255).round_()
    return scaled_3NYX.to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def from_uint8(frames_NYX3: Tensor) -> Tensor:
    """uint8 RGB frames [N, Y, X, 3] to float32 video [3, N, Y, X] in [-1, 1]: x / 127.5 - 1."""
    return frames_NYX3.permute(3, 0, 1, 2).float() / 127.5 - 1


def _statistics(vae: AutoencoderKLWan, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (-1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, dtype=torch.float32, device=device).view(shape)
    std = torch.tensor(vae.config.latents_std, dtype=torch.float32, device=device).view(shape)
    return mean, std
