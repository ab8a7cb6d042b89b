"""Decoding by stripes of rows against the decoding of whole frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longtake.engine import vae_stripes
from longtake.engine.gang import join
from longtake.engine.vae import StreamingDecoder
from longtake.engine.vae_fast import make_fast
from longtake.engine.vae_stripes import Stripe, StripedDecoder, StripeWorker, dealt, reaches, stages
from longtake.kernels.errors import ConfigError
from tests.engine.gangs import run_ranks


def make_vae() -> AutoencoderKLWan:
    torch.manual_seed(2)
    vae = AutoencoderKLWan(
        base_dim=16, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return vae.eval().requires_grad_(False)


def clip() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(4, 5, 7, 6)  # 7 rows: no gang divides them


def whole() -> dict[str, Tensor]:
    vae = make_vae()
    decoder = StreamingDecoder(vae)
    frames = torch.cat([decoder.decode(part) for part in clip().split([2, 3], dim=1)])
    decoder.reset()
    decoder.warm_up(clip()[:, :3])
    return {"frames": frames, "later": decoder.decode(clip()[:, 3:]), "state": torch.tensor(decoder.state_bytes)}


def decode(rank: int, fast: bool) -> dict[str, Any] | int:
    vae = make_fast(make_vae()) if fast else make_vae()
    with join() as gang:
        axis = gang.host_axis()
        if not gang.leads:
            worker = StripeWorker(vae, axis, gang)
            worker.join()
            return worker._decoder.state_bytes
        decoder = StripedDecoder(vae, axis, gang)
        frames = torch.cat([decoder.decode(part) for part in clip().split([2, 3], dim=1)])
        decoder.reset()
        decoder.warm_up(clip()[:, :3])
        later = decoder.decode(clip()[:, 3:])
        decoder.close()
        return {"frames": frames.numpy(), "later": later.numpy(), "state": decoder.state_bytes}


@pytest.mark.parametrize(("num_ranks", "fast"), [(2, False), (4, False), (3, True)])
def test_stripes_make_up_the_frames(num_ranks: int, fast: bool) -> None:
    expected = whole()
    found = run_ranks(decode, num_ranks, fast)
    assert isinstance(found[0], dict), found
    for name in ("frames", "later"):
        assert found[0][name].shape == expected[name].shape
        off = np.abs(found[0][name].astype(int) - expected[name].numpy().astype(int))
        assert off.max() <= 1 and (off > 0).mean() < 1e-3  # a rounding at the edge between two of 256 levels
    assert all(state < int(expected["state"]) for state in (found[0]["state"], *found[1:]))


TALL = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
RESIDUAL = {**TALL, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 4}


def tall_decoder(config: dict[str, Any], fast: bool = False) -> StreamingDecoder:
    torch.manual_seed(4)
    scale = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae: Any = AutoencoderKLWan(dim_mult=[1, 1, 1, 1], **config, **scale)
    vae = vae.double().eval().requires_grad_(False)
    return StreamingDecoder(make_fast(vae) if fast else vae)


def stacked(latents: Tensor, config: dict[str, Any], fast: bool) -> Tensor:
    """Frames of three stripes, each decoded by itself."""
    frames = []
    for index in range(3):
        decoder = tall_decoder(config, fast)
        Stripe(decoder.vae.decoder, index, 3).of(latents.shape[2])
        frames.append(torch.cat(list(decoder.pieces(latents)), dim=1))
    return torch.cat(frames, dim=2)


@pytest.mark.parametrize(("config", "fast"), [(TALL, False), (RESIDUAL, False), (TALL, True)])
def test_a_stripe_needs_nothing_beyond_its_reach(
    config: dict[str, Any], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame so tall that most rows of it are cut from what a stripe's layers see."""
    latents = torch.randn(4, 3, 44, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    whole = torch.cat(list(tall_decoder(config, fast).pieces(latents)), dim=1)
    assert whole.std() > 1e-3
    atol = 1e-6 if fast else 1e-12  # the fast layers have float32 inside
    torch.testing.assert_close(stacked(latents, config, fast), whole, rtol=0, atol=atol)
    exact = reaches(stages(tall_decoder(config).vae.decoder))
    for number in range(len(exact)):
        less = [reach - (index == number) for index, reach in enumerate(exact)]
        monkeypatch.setattr(vae_stripes, "reaches", lambda _, less=less: less)
        assert (stacked(latents, config, fast) - whole).abs().max() > 1e-12, (
            f"{exact[number]} rows are more than needed"
        )


@pytest.mark.parametrize(("num_rows", "count"), [(60, 4), (60, 3), (7, 4), (5, 4), (4, 4), (9, 2), (6, 1)])
def test_every_row_is_dealt_once(num_rows: int, count: int) -> None:
    parts = [dealt(num_rows, index, count) for index in range(count)]
    assert [row for part in parts for row in part] == list(range(num_rows))
    assert all(parts)


def work(index: int, count: int) -> int:
    """Floating point operations of a stripe of a latent of Wan2.1's at 480 x 832, behind a clip's first two."""
    with torch.device("meta"):
        decoder = StreamingDecoder(AutoencoderKLWan().eval())
    latents = torch.empty(16, 1, 60, 104, device="meta")
    Stripe(decoder.vae.decoder, index, count).of(60)
    decoder.warm_up(latents)
    decoder.warm_up(latents)
    with FlopCounterMode(display=False) as counted:
        decoder.warm_up(latents)
    return int(counted.get_total_flops())


@pytest.mark.parametrize(("count", "most"), [(2, 0.55), (4, 0.325)])
def test_stripes_share_the_work(count: int, most: float) -> None:
    whole = work(0, 1)
    assert all(1 / count < work(index, count) / whole < most for index in range(count))


def test_stripes_at_the_edges_are_larger() -> None:
    assert [len(dealt(60, index, 4)) for index in range(4)] == [16, 14, 14, 16]


def too_few(rank: int) -> None:
    with join() as gang:
        axis = gang.host_axis()
        if gang.leads:
            StripedDecoder(make_vae(), axis, gang).decode(clip()[:, :, :1])
        else:
            StripeWorker(make_vae(), axis, gang).join()
            gang.check()


def test_fewer_rows_than_ranks() -> None:
    for error in run_ranks(too_few, 2):
        assert isinstance(error, ConfigError)
        assert "1 latent rows cannot be decoded by 2 processes" in str(error)
