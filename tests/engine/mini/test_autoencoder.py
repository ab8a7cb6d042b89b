"""The whole-clip forward is the class's own chunked one; the model is as small as promised; training restarts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from longtake.engine.mini import train_vae
from longtake.engine.mini.autoencoder import CONVOLUTIONS, ClipForward, encode_clips, new_autoencoder


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("frames", [1, 5, 17])
def test_whole_clip_equals_chunked(convolution: str, frames: int) -> None:
    torch.manual_seed(0)
    vae = new_autoencoder().eval()
    forward = ClipForward(vae, convolution=convolution)
    video = torch.rand(2, 3, frames, 32, 48) * 2 - 1
    with torch.no_grad():
        moments = forward.encode(video)
        assert torch.allclose(moments, vae.encode(video).latent_dist.parameters, atol=1e-5)
        output = forward.decode(moments[:, :16])
        assert output.shape == video.shape
        assert torch.allclose(output.clamp(-1, 1), vae.decode(moments[:, :16]).sample, atol=1e-5)


def test_gradients_equal_chunked() -> None:
    torch.manual_seed(0)
    vae = new_autoencoder()
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    grads = []
    for encode in (lambda v: ClipForward(vae).encode(v), lambda v: vae.encode(v).latent_dist.parameters):
        vae.zero_grad()
        encode(video).square().sum().backward()
        grads.append([p.grad.clone() for p in vae.encoder.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_size() -> None:
    assert sum(p.numel() for p in new_autoencoder().parameters()) <= 1_200_000


def test_bulk_encoding_normalises() -> None:
    vae = new_autoencoder()
    vae.register_to_config(latents_mean=[1.0] * 16, latents_std=[2.0] * 16)
    video = torch.rand(3, 5, 3, 16, 16)
    plain = ClipForward(vae).encode(video.transpose(1, 2) * 2 - 1)[:, :16]
    assert torch.allclose(encode_clips(ClipForward(vae), video, frames_at_once=10), (plain - 1) / 2, atol=1e-5)


def test_training_runs_evaluates_and_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = train_vae.Plan(
        pool_worlds=1, shapes=((1, 5),), eval_worlds=1, eval_frames=5, long_worlds=1, long_frames=5, stats_worlds=1
    )
    monkeypatch.setattr(train_vae, "TINY", small)
    arguments = argparse.Namespace(
        out=tmp_path, device="cpu", tiny=True, learning_rate=1e-3, resume=None, seconds=1.0, reserve_seconds=0.5
    )
    train_vae.run(arguments)
    first = json.loads((tmp_path / "vae.json").read_text())
    assert (tmp_path / "vae.png").stat().st_size > 0
    assert (tmp_path / "state.pt").stat().st_size <= 16 * 2**20
    assert first["max_difference_from_chunked"] < 1e-4
    arguments.resume = tmp_path / "state.pt"
    train_vae.run(arguments)
    assert json.loads((tmp_path / "vae.json").read_text())["steps"] > first["steps"]
