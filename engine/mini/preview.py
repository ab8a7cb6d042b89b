"""Films from prompts alone, made while training goes on: a contact sheet to look at, two numbers that show drift.

Shape legend: W worlds, K moments of a film, Q blocks, C latent channels, F latent frames, Y, X rows and columns.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from longtake.engine.mini.autoencoder import ClipForward, statistics
from longtake.engine.mini.clips import CLIP_BLOCKS, NUM_PROMPTS, ClipBuffer
from longtake.engine.mini.films import Film, Player
from longtake.engine.mini.teacher_forcing import Layout
from longtake.engine.mini.train_dit import Trainee

_LEAD_BLOCKS = 2  # decoded before a moment, so that its frame has most of its past
_MARGIN_PX = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewPlan:
    """What a preview makes.

    Args:
        worlds: films at once, one a row.
        blocks: of each film.
        moments: frames shown of each, evenly spread.
        window: history blocks attended, the first one among them.
        sigmas: of the sampler's steps.
    """

    worlds: int = 8
    blocks: int = 16
    moments: int = 8
    window: int = 25
    sigmas: tuple[float, ...] = (1.0, 0.9, 0.75, 0.5)


@torch.no_grad()
def preview(
    model: Trainee, average: Mapping[str, Tensor], clips: ClipBuffer, layout: Layout, plan: PreviewPlan, path: Path
) -> str:
    """Make films under first prompts of clips, draw them (a row a world) and describe them in one line.

    Args:
        model: whose averaged weights are looked at; it stays as it is.
        average: those weights, by name.
        clips: prompts, the truth to compare with, and the VAE.
        layout: sizes of a block.
        plan: sizes of the preview.
        path: of the PNG.

    Returns:
        Sharpness of each moment relative to true frames', and by how many of 255 levels the mean colour has moved.
    """
    averaged = copy.deepcopy(model)
    for name, parameter in averaged.named_parameters():
        parameter.copy_(average[name])
    drawn = clips.sample_clips(plan.worlds)
    device = drawn.tokens_BPK.device
    embeds = averaged.encode_text(drawn.tokens_BPK)
    player = Player(averaged.transformer, device).model
    film = Film(player, layout, embeds.to(player.proj_out.weight.dtype), NUM_PROMPTS, plan.sigmas, plan.window)
    prompt = torch.zeros(plan.worlds, dtype=torch.int64, device=device)
    latents = torch.cat([film.step(prompt) for _ in range(plan.blocks)], dim=2)
    frames = shown(clips.autoencoder, latents, layout, plan.moments)
    truth = shown(clips.autoencoder, drawn.latents_BCFYX.float(), layout, min(plan.moments, CLIP_BLOCKS))
    contact_sheet(frames, path)
    relative = sharpness(frames).mean(0) / sharpness(truth).mean()
    colour = frames.mean(dim=(3, 4))
    moved = (colour - colour[:, :1]).abs().mean(dim=(0, 2)) * 255
    return f"sharpness {_list(relative, 2)} of the truth's; colour moved by {_list(moved, 1)}; {path.name}"


def shown(autoencoder: ClipForward, latents_WCFYX: Tensor, layout: Layout, moments: int) -> Tensor:
    """The last frames of evenly spread blocks of films, the last block among them: float32 [W, K, 3, Y, X] in [0, 1].

    Each is decoded from its block and the few before it.
    """
    worlds, _, num_latents = latents_WCFYX.shape[:3]
    num_blocks = num_latents // layout.block_frames
    span = min(1 + _LEAD_BLOCKS, num_blocks) * layout.block_frames
    ends = [max(span, round(num_blocks * (k + 1) / moments) * layout.block_frames) for k in range(moments)]
    mean, std = statistics(autoencoder.vae, latents_WCFYX.device)
    dtype = next(autoencoder.vae.parameters()).dtype
    rows = []
    for end in ends:
        video = autoencoder.decode((latents_WCFYX[:, :, end - span : end] * std + mean).to(dtype))
        rows.append(video[:, :, -1].float().clamp(-1, 1) / 2 + 0.5)
    frames = torch.stack(rows, dim=1)
    assert frames.shape[:2] == (worlds, moments)
    return frames


def sharpness(frames_WK3YX: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, [W, K]."""
    across = frames_WK3YX.diff(dim=4).abs().mean(dim=(2, 3, 4))
    return across + frames_WK3YX.diff(dim=3).abs().mean(dim=(2, 3, 4))


def contact_sheet(frames_WK3YX: Tensor, path: Path) -> None:
    """Draw frames in [0, 1] as a table of W rows and K columns, with white margins."""
    padded = torch.nn.functional.pad(frames_WK3YX.cpu(), [0, _MARGIN_PX, 0, _MARGIN_PX], value=1.0)
    table = padded.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # W Y K X 3
    Image.fromarray((table * 255).round().byte().numpy()).save(path)


def _list(values: Tensor, digits: int) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values.tolist())
