"""Streaming VAE: the bits of the whole clip, whatever the split."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from longtake.engine.vae import (
    StreamingDecoder,
    StreamingEncoder,
    decoder_state_bytes,
    denormalise,
    from_uint8,
    load_vae,
    normalise,
    receptive_latents,
    spatial_stride,
    temporal_stride,
    to_channels_last,
    to_uint8,
)
from longtake.engine.vae_fast import make_fast
from longtake.kernels.errors import ConfigError, StorageError

CHANNELS, HEIGHT, WIDTH, LATENTS = 4, 3, 5, 6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With several threads the whole-clip reference itself cuts its first, 1x1x1, convolution by clip length."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CONFIGS: dict[str, dict[str, Any]] = {
    "wan2.1": {"dim_mult": [1, 2, 2], "temperal_downsample": [True, True]},
    "wan2.1-deep": {"dim_mult": [1, 1, 2, 2], "temperal_downsample": [False, True, True]},
    "early-time": {"dim_mult": [1, 1, 2, 2], "temperal_downsample": [True, False, True]},
    "half-time": {"dim_mult": [1, 2, 2], "temperal_downsample": [False, True]},
    "no-time": {"dim_mult": [1, 2], "temperal_downsample": [False]},
    "wan2.2": {
        "dim_mult": [1, 2, 2, 2],
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "decoder_base_dim": 12,
    },
    "residual": {"dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "is_residual": True},
}
FOUR_FRAMES = [name for name in CONFIGS if name not in ("half-time", "no-time")]


def make_vae(name: str, seed: int = 0) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=CHANNELS,
        num_res_blocks=1,
        latents_mean=[0.3, -0.2, 0.1, 0.5],
        latents_std=[1.7, 0.6, 2.1, 1.1],
        **CONFIGS[name],
    )
    with torch.no_grad():  # biases and gammas away from 0 and 1, and activations that fill [-1, 1] and leave it
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return vae.eval().requires_grad_(False)


def make_latents(num: int = LATENTS, seed: int = 1) -> Tensor:
    return torch.randn(CHANNELS, num, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def make_frames(vae: AutoencoderKLWan, num: int, seed: int = 2) -> Tensor:
    stride = spatial_stride(vae)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, HEIGHT * stride, WIDTH * stride, 3), generator=generator, dtype=torch.uint8)


def whole_decode(vae: AutoencoderKLWan, latents_CFHW: Tensor) -> Tensor:
    video: Tensor = vae.decode(denormalise(latents_CFHW, vae)[None]).sample[0]
    return video


def decoded(decoder: StreamingDecoder, latents_CFHW: Tensor) -> Tensor:
    """The clip's next frames before they are rounded, [3, N, Y, X]."""
    return torch.cat(list(decoder.pieces(latents_CFHW)), dim=1)


def whole_encode(vae: AutoencoderKLWan, frames_NYX3: Tensor) -> Tensor:
    return normalise(vae.encode(from_uint8(frames_NYX3)[None]).latent_dist.mode()[0], vae)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cuts", [tuple(range(1, LATENTS)), (3,), (1, 5)], ids=["each", "blocks", "uneven"])
def test_decode_has_the_bits_of_the_whole_clip(name: str, cuts: tuple[int, ...]) -> None:
    vae, latents = make_vae(name), make_latents()
    whole = whole_decode(vae, latents)
    assert whole.shape[1] == 1 + (LATENTS - 1) * temporal_stride(vae)
    assert whole.shape[2:] == (HEIGHT * spatial_stride(vae), WIDTH * spatial_stride(vae))
    assert whole.min() < -0.2 and whole.max() > 0.2
    decoder = StreamingDecoder(vae)
    pieces = [decoded(decoder, latents[:, start:end]) for start, end in pairwise((0, *cuts, LATENTS))]
    assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_frames_are_the_rounded_video() -> None:
    vae, latents = make_vae("wan2.1"), make_latents()
    decoder = StreamingDecoder(vae)
    frames = torch.cat([decoder.decode(latents[:, :2]), decoder.decode(latents[:, 2:])])
    assert torch.equal(frames, to_uint8(whole_decode(vae, latents)))
    assert frames.dtype == torch.uint8 and frames.is_contiguous()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cuts", [tuple(range(1, 13)), (1, 5, 9), (3, 4, 11)], ids=["each", "fours", "uneven"])
def test_encode_has_the_bits_of_the_whole_clip(name: str, cuts: tuple[int, ...]) -> None:
    vae = make_vae(name)
    frames = make_frames(vae, 13)
    whole = whole_encode(vae, frames)
    encoder = StreamingEncoder(vae)
    pieces = [encoder.encode(frames[start:end]) for start, end in pairwise((0, *cuts, 13))]
    assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_memory_is_flat_in_clip_length() -> None:
    vae = make_vae("wan2.1-deep")
    decoder = StreamingDecoder(vae)
    sizes = []
    for seed in range(8):
        decoder.warm_up(make_latents(1, seed))
        sizes.append(decoder.state_bytes)
    assert len(set(sizes[2:])) == 1
    assert sizes[-1] == decoder_state_bytes(vae, HEIGHT, WIDTH)


@pytest.mark.parametrize("fast", [False, True])
def test_a_new_state_takes_the_place_of_the_old_one(fast: bool) -> None:
    """By the last layer nothing is left of the old state but what that layer has not read yet."""
    vae = make_vae("wan2.1")
    decoder = StreamingDecoder(make_fast(vae) if fast else vae)
    decoder.decode(make_latents(3))
    old = [weakref.ref(slot) for slot in decoder._slots if isinstance(slot, Tensor)]
    left: list[int] = []
    vae.decoder.norm_out.register_forward_pre_hook(lambda *_: left.append(sum(one() is not None for one in old)))
    if fast:  # whose last norm is one pass with the border
        last = vae.decoder.up_blocks[-1]
        last.register_forward_hook(lambda *_: left.append(sum(one() is not None for one in old)))
    decoder.decode(make_latents(1))
    assert len(old) > 5 and left and left[-1] <= 1


def test_a_decode_that_fails_loses_the_clip() -> None:
    vae = make_vae("wan2.1")
    decoder, latents = StreamingDecoder(vae), make_latents(3)
    first = decoder.decode(latents)
    hook = vae.decoder.norm_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decoder.decode(latents)
    hook.remove()
    assert decoder.state_bytes == 0
    assert torch.equal(decoder.decode(latents), first)


@pytest.mark.parametrize("name", ["wan2.1", "half-time", "residual"])
def test_recent_latents_rebuild_the_state(name: str) -> None:
    vae = make_vae(name)
    reach = receptive_latents(vae)
    latents = torch.randn(CHANNELS, reach + 5, 1, 2, generator=torch.Generator().manual_seed(3))
    whole, rebuilt, short = StreamingDecoder(vae), StreamingDecoder(vae), StreamingDecoder(vae)
    whole.warm_up(latents[:, :-2])
    rebuilt.warm_up(latents[:, 3:-2])
    short.warm_up(latents[:, -5:-2])
    assert rebuilt.state_bytes == whole.state_bytes
    for ours, theirs in zip(rebuilt._slots, whole._slots, strict=True):
        same = torch.equal(ours, theirs) if isinstance(ours, Tensor) and isinstance(theirs, Tensor) else ours == theirs
        assert same
    expected = decoded(whole, latents[:, -2:])
    assert torch.equal(decoded(rebuilt, latents[:, -2:]), expected)
    assert not torch.equal(decoded(short, latents[:, -2:]), expected)


def test_warm_up_makes_every_later_latent_a_later_one() -> None:
    vae = make_vae("wan2.1")
    decoder = StreamingDecoder(vae)
    decoder.warm_up(make_latents(3))
    assert len(decoder.decode(make_latents(2))) == 8
    decoder.reset()
    assert len(decoder.decode(make_latents(2))) == 5


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
@pytest.mark.parametrize(("dtype", "channels_last"), [(torch.float32, True), (torch.bfloat16, False)])
def test_other_layouts_and_types_do_not_depend_on_the_split(name: str, dtype: torch.dtype, channels_last: bool) -> None:
    vae, latents = make_vae(name).to(dtype), make_latents()
    if channels_last:
        to_channels_last(vae)
    first, second = StreamingDecoder(vae), StreamingDecoder(vae)
    whole = decoded(first, latents)
    head = decoded(second, latents[:, :4])
    slots = [slot for slot in second._slots if isinstance(slot, Tensor)]
    assert any(not slot.is_contiguous() for slot in slots) == channels_last
    assert torch.equal(torch.cat([head, decoded(second, latents[:, 4:])], dim=1), whole)
    torch.testing.assert_close(whole, whole_decode(make_vae(name).to(dtype), latents), atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_no_split_changes_a_bit(dtype: torch.dtype) -> None:
    vae = make_vae("wan2.1-deep").to("cuda", dtype)
    latents = torch.randn(CHANNELS, 9, 12, 20, device="cuda")
    first, second = StreamingDecoder(vae), StreamingDecoder(vae)
    whole = decoded(first, latents)
    pieces = [decoded(second, part) for part in latents.split([4, 5], dim=1)]
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    # TF32, and another order of sums in the whole clip's first layer
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(whole, whole_decode(vae, latents), atol=tolerance, rtol=0)


def test_uint8_rounds_half_to_even_and_clamps() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, 2 * 0.5 / 255 - 1, 2 * 1.5 / 255 - 1])
    frames = to_uint8(values.double().view(1, 1, 1, -1).expand(3, 1, 1, -1))
    assert frames.shape == (1, 1, 7, 3) and frames.is_contiguous()
    assert frames[0, 0, :5, 0].tolist() == [0, 0, 128, 255, 255]  # 127.5 goes to the even 128
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 1, 256, 3)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)


def test_normalise_and_denormalise_are_inverse() -> None:
    vae, latents = make_vae("wan2.1"), make_latents()
    torch.testing.assert_close(normalise(denormalise(latents, vae), vae), latents)
    assert denormalise(latents, vae)[1, 0, 0, 0] == latents[1, 0, 0, 0] * 0.6 + -0.2


def test_bad_shapes_are_named() -> None:
    vae = make_vae("wan2.1")
    decoder, encoder = StreamingDecoder(vae), StreamingEncoder(vae)
    with pytest.raises(ConfigError, match=r"\[4, F >= 1, H, W\]"):
        decoder.decode(torch.zeros(3, 1, 2, 2))
    with pytest.raises(ConfigError, match="no batch"):
        decoder.decode(torch.zeros(1, CHANNELS, 1, 2, 2))
    decoder.decode(torch.zeros(CHANNELS, 1, 2, 2))
    with pytest.raises(ConfigError, match="reset"):
        decoder.decode(torch.zeros(CHANNELS, 1, 2, 3))
    with pytest.raises(ConfigError, match="do not divide"):
        encoder.encode(torch.zeros(1, 6, 8, 3, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="uint8"):
        encoder.encode(torch.zeros(1, 8, 8, 3))


def test_load_vae_from_a_model_folder(tmp_path: Path) -> None:
    vae, latents = make_vae("wan2.1"), make_latents(2)
    vae.save_pretrained(tmp_path / "vae")
    loaded = load_vae(tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(StreamingDecoder(loaded).decode(latents), StreamingDecoder(vae).decode(latents))
    assert torch.equal(
        StreamingDecoder(load_vae(tmp_path / "vae")).decode(latents), StreamingDecoder(vae).decode(latents)
    )
    assert load_vae(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    to_channels_last(loaded)
    assert loaded.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    tensors.pop("decoder.conv_out.bias")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(StorageError, match=r"lacks weights, decoder\.conv_out\.bias"):
        load_vae(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(StorageError, match="does not load"):
        load_vae(tmp_path)
    weights.unlink()
    with pytest.raises(StorageError, match="does not load"):
        load_vae(tmp_path)
    with pytest.raises(ConfigError, match="no VAE here"):
        load_vae(tmp_path / "elsewhere")
