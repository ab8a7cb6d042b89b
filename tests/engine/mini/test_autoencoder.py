"""The whole-clip forward is the class's own chunked one; the model is as small as promised; training restarts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longtake.engine.mini import train_vae
from longtake.engine.mini.autoencoder import CONVOLUTIONS, ClipForward, encode_clips, new_autoencoder
from longtake.engine.mini.evaluate_vae import EvalPlan


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


def small_plan() -> train_vae.Plan:
    measured = EvalPlan(eval_worlds=1, eval_frames=5, long_worlds=1, long_frames=5, stats_worlds=1)
    return train_vae.Plan(
        shapes=((1, 5),), store_clips=1, store_frames=5, clips_at_once=1, workers=0, measured=measured
    )


def test_training_runs_evaluates_and_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_vae, "TINY", small_plan())
    arguments = argparse.Namespace(
        out=tmp_path,
        device="cpu",
        tiny=True,
        learning_rate=1e-3,
        resume=None,
        seconds=0.0,  # one step each time
        reserve_seconds=0.5,
        decoder_only=False,
    )
    train_vae.run(arguments)
    first = json.loads((tmp_path / "vae.json").read_text())
    assert (tmp_path / "vae.png").stat().st_size > 0
    assert (tmp_path / "state.pt").stat().st_size <= 16 * 2**20
    assert first["max_difference_from_chunked"] < 1e-4
    encoder = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    arguments.resume, arguments.decoder_only = tmp_path / "state.pt", True
    train_vae.run(arguments)
    second = json.loads((tmp_path / "vae.json").read_text())
    assert second["steps"] > first["steps"]
    assert second["latents_mean"] == first["latents_mean"]
    after = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    kept = {name for name, tensor in encoder.items() if torch.equal(tensor, after[name])}
    assert kept >= {name for name in encoder if name.startswith(("encoder.", "quant_conv."))}
    assert "decoder.conv_in.weight" not in kept


def test_training_goes_on_from_a_state_and_from_a_saved_model(tmp_path: Path) -> None:
    trainer = train_vae.Trainer(small_plan(), torch.device("cpu"), 1e-3)
    trainer.train_step(0.0)
    trainer.save(tmp_path / "state.pt")
    again = train_vae.Trainer(small_plan(), torch.device("cpu"), 1e-3)
    again.load(tmp_path / "state.pt")
    assert again.step == 1
    for name, parameter in trainer.learning.items():
        assert torch.equal(parameter, again.learning[name])
    again.train_step(0.5)
    trainer.vae.to(torch.float16).save_pretrained(tmp_path / "vae")
    for decoder_only in (False, True):
        folder = train_vae.Trainer(small_plan(), torch.device("cpu"), 1e-3, decoder_only=decoder_only)
        folder.load(tmp_path / "vae")
        assert torch.equal(folder.average["encoder.conv_in.weight"], trainer.vae.encoder.conv_in.weight.float())


@pytest.mark.gpu
def test_fused_norm_equals_plain() -> None:
    assert train_vae.can_fuse(torch.device("cuda"))
