"""The decoder made for GPUs against diffusers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longtake.engine.vae import StreamingDecoder
from longtake.engine.vae_fast import make_fast

SPLITS = ([1, 1, 1, 1, 1, 1], [2, 3, 1], [6])


def make_vae(name: str) -> AutoencoderKLWan:
    common: dict[str, Any] = {"num_res_blocks": 1, "dim_mult": [1, 2, 2, 2]}
    channels = 4 if name == "wan2.1" else 8
    stats = {"z_dim": channels, "latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    if name == "wan2.2":
        common |= {"is_residual": True, "decoder_base_dim": 16, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=16, **common, **stats).eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return vae


def decoded(vae: AutoencoderKLWan, latents: Tensor, split: list[int]) -> tuple[Tensor, int]:
    decoder = StreamingDecoder(vae)
    frames = torch.cat([piece for part in latents.split(split, dim=1) for piece in decoder.pieces(part)], dim=1)
    return frames.float().cpu(), decoder.state_bytes


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_same_frames(name: str, split: list[int]) -> None:
    vae = make_vae(name)
    latents = torch.randn(vae.config.z_dim, 6, 5, 7, generator=torch.Generator().manual_seed(1))
    want, state_bytes = decoded(vae, latents, [6])
    got, fast_bytes = decoded(make_fast(copy.deepcopy(vae)), latents, split)
    assert (want.abs() < 1).float().mean() > 0.9  # not clamped: a difference would show
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert fast_bytes == state_bytes


def test_what_is_kept_beside_the_weights_is_counted() -> None:
    vae = make_vae("wan2.1")
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    assert StreamingDecoder(vae).weight_bytes == weights
    make_fast(vae)
    ups = [module for module in vae.decoder.modules() if hasattr(module, "phases")]
    kept = sum(up.phases.nbytes for up in ups) + sum(
        m.pairs.nbytes for m in vae.decoder.modules() if hasattr(m, "pairs")
    )
    assert ups and StreamingDecoder(vae).weight_bytes == weights + kept


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_what_convolutions_read_is_seen_to_be_channels_last(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch goes by strides, that of the single clip among them, where a kernel has no extent."""
    convolve, read = torch.nn.Conv3d._conv_forward, []

    def watched(conv: torch.nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        read.append((x.shape, x.stride()))
        result: Tensor = convolve(conv, x, weight, bias)
        return result

    vae = make_fast(make_vae(name))
    decoder = StreamingDecoder(vae)
    decoder.warm_up(torch.randn(vae.config.z_dim, 2, 5, 7))
    monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", watched)
    vae.decoder.forward(
        torch.randn(1, vae.config.z_dim, 1, 5, 7), feat_cache=list(decoder._slots), feat_idx=[0], first_chunk=False
    )
    assert len(read) > 20
    for shape, stride in read:
        _, channels, _, height, width = shape
        assert stride == (shape.numel(), 1, channels * height * width, channels * width, channels)


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_bfloat16_is_no_further_off_than_diffusers_own(name: str) -> None:
    check_bfloat16(name, "cpu", (5, 7))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_bfloat16_is_no_further_off_than_diffusers_own_on_a_gpu(name: str) -> None:
    check_bfloat16(name, "cuda", (12, 20))


def check_bfloat16(name: str, device: str, size: tuple[int, int]) -> None:
    """Each of some thirty layers rounds to 2^-9, so a few of a million pixels are a tenth off in either decoder: what
    can be asked is that the error as a whole does not grow."""
    vae = make_vae(name)
    latents = torch.randn(vae.config.z_dim, 6, *size, generator=torch.Generator().manual_seed(1))
    want, _ = decoded(vae, latents, [6])
    plain = copy.deepcopy(vae).to(device, torch.bfloat16)
    errors = []
    for each in (plain, make_fast(copy.deepcopy(plain))):
        got, _ = decoded(each, latents.to(device), [2, 3, 1])
        errors.append((got - want).square().mean().sqrt().item())
    assert 0 < errors[1] <= 1.1 * errors[0] < 0.1 * want.std().item()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_frames_on_a_gpu(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # it rounds what convolutions read to 2^-11
    vae = make_vae(name)
    latents = torch.randn(vae.config.z_dim, 6, 12, 20, generator=torch.Generator().manual_seed(1))
    fast = make_fast(copy.deepcopy(vae).to("cuda", dtype))
    got, _ = decoded(fast, latents.cuda(), [2, 3, 1])
    if dtype == torch.float32:
        want, _ = decoded(vae, latents, [6])
        torch.testing.assert_close(got, want, rtol=0, atol=2e-3)
    again, _ = decoded(fast, latents.cuda(), [1, 5])
    assert torch.equal(again, got)
