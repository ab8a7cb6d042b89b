"""How good a trained VAE is on held-out worlds, and its latents' statistics. Shapes: see world.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from .autoencoder import ClipForward
from .clip_store import MAX_SPEED, Pool, random_cameras, random_worlds
from .world import FPS, HEIGHT, RING_PX, WIDTH

HELD_OUT_SEED = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalPlan:
    """How many worlds and frames are measured."""

    eval_worlds: int = 72
    eval_frames: int = 33
    long_worlds: int = 8
    long_frames: int = 161
    stats_worlds: int = 288


def held_out(count: int, frames: int, device: torch.device, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Render held-out worlds, the camera's speed going round -4..4; returns clips [W, 3, T, Y, X] and speeds [W]."""
    pool = Pool([HELD_OUT_SEED + offset + n for n in range(count)], device)
    speed = torch.arange(count) % (2 * MAX_SPEED + 1) - MAX_SPEED
    angle = (torch.arange(count) * 97 % RING_PX)[:, None] + speed[:, None] * torch.arange(frames)
    seconds = torch.full((count, 1), 2.5) + torch.arange(frames) / FPS
    return pool.cut(torch.arange(count), angle.double(), seconds.double()), speed


def latent_statistics(forward: ClipForward, plan: EvalPlan, device: torch.device) -> tuple[list[float], list[float]]:
    """Measure each latent channel's mean and standard deviation over training worlds."""
    total, squares, count = torch.zeros(16, device=device), torch.zeros(16, device=device), 0
    generator = torch.Generator().manual_seed(2)
    for first in range(0, plan.stats_worlds, 32):
        number = min(32, plan.stats_worlds - first)
        angle, seconds = random_cameras(number, plan.eval_frames, generator)
        pool = Pool(list(range(5_000_000 + first, 5_000_000 + first + number)), device)
        latents = forward.encode(pool.cut(torch.arange(number), angle, seconds))[:, :16].double()
        total, squares = total + latents.sum((0, 2, 3, 4)), squares + latents.square().sum((0, 2, 3, 4))
        count += latents.numel() // 16
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-8).sqrt()
    return [round(v, 5) for v in mean.tolist()], [round(v, 5) for v in std.tolist()]


def psnr(mean_square: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean square error on the scale [0, 1]."""
    return -10 * torch.log10(mean_square.clamp_min(1e-12))


@torch.no_grad()
def evaluate(
    vae: AutoencoderKLWan, plan: EvalPlan, device: torch.device, convolution: str, picture: Path
) -> dict[str, Any]:
    """Measure reconstruction on held-out worlds by motion, light and weather, and late in a long clip; draw a sheet."""
    forward = ClipForward(vae, convolution=convolution)

    def reconstruct(video: Tensor) -> Tensor:
        clips = [forward.decode(forward.encode(c)[:, :16]) for c in video.split(8)]
        # As a viewer gets it: eight bits a channel.
        return ((torch.cat(clips).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1

    video, speed = held_out(plan.eval_worlds, plan.eval_frames, device)
    output = reconstruct(video)
    error = ((output - video) / 2).square().mean((1, 3, 4))  # [W, T]
    report: dict[str, Any] = {
        "psnr": float(psnr(error.mean())),
        "psnr_mean_of_clips": float(psnr(error.mean(1)).mean()),
        "psnr_worst_clip": float(psnr(error.mean(1)).min()),
        "psnr_first_frame": float(psnr(error[:, 0].mean())),
        "psnr_by_speed": {
            str(s): float(psnr(error[(speed.abs() == s).to(device)].mean())) for s in sorted(set(speed.abs().tolist()))
        },
    }
    worlds = random_worlds([HELD_OUT_SEED + n for n in range(plan.eval_worlds)], torch.device("cpu"))
    for name in ("weather", "time"):
        kinds = getattr(worlds, f"event_{name}_WE")
        report[f"psnr_by_{name}"] = {
            str(k): float(psnr(error[(kinds[:, 0] == k).to(device)].mean())) for k in sorted(set(kinds[:, 0].tolist()))
        }
    own = vae.decode(vae.encode(video[:2]).latent_dist.mode()).sample
    report["max_difference_from_chunked"] = float(
        (own - forward.decode(forward.encode(video[:2])[:, :16]).clamp(-1, 1)).abs().max()
    )
    contact_sheet(video, output, picture)
    long, _ = held_out(plan.long_worlds, plan.long_frames, device, offset=100_000)
    error = ((reconstruct(long) - long) / 2).square().mean((1, 3, 4))
    half = plan.long_frames // 2
    report["psnr_long_clip"] = {
        "first half": float(psnr(error[:, :half].mean())),
        "second half": float(psnr(error[:, half:].mean())),
    }
    return report


def contact_sheet(video: Tensor, output: Tensor, path: Path, columns: int = 6, rows: int = 3) -> None:
    """Draw the last frames of clips: each row of truth over its row of reconstructions."""
    frames = torch.stack([video[:, :, -1], output[:, :, -1]], 1)[: columns * rows].cpu()  # [W, 2, 3, Y, X]
    sheet = torch.ones(2 * rows * (HEIGHT + 4), columns * (WIDTH + 4), 3)
    for n, pair in enumerate(frames):
        row, column = divmod(n, columns)
        for which in range(2):
            top, left = (2 * row + which) * (HEIGHT + 4) + 2, column * (WIDTH + 4) + 2
            sheet[top : top + HEIGHT, left : left + WIDTH] = (pair[which].permute(1, 2, 0) + 1) / 2
    Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().numpy()).save(path, optimize=True)
