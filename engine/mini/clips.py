"""Training clips as latents on the device: rendered, encoded and captioned on the fly, replaced little by little.

A clip is 30 s of a world under a script of one to three prompts, or the first blocks of one. A training sequence takes
some of its blocks: a run, or a sparse past and a recent run, at their true places in time, closed up, or with a gap, so
that full histories, windows with sinks and retrieved blocks are all seen.

Most of what a long clip shows it has shown before. What a film must invent is learned from beginnings: clips of a few
blocks, of which there can be many more.

Shape legend: M clips, B batch, N blocks of a sequence, Q blocks of a clip, C channels, F latent frames, Y, X latent
rows and columns, K text tokens, P prompts of a clip, T tokens of the doubled sequence.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longtake.engine.mini.autoencoder import ClipForward, encode_clips
from longtake.engine.mini.prompts import BEAT_GRID_S, Script, camera_path, random_scripts, stage, tokens
from longtake.engine.mini.ranks import Ranks
from longtake.engine.mini.render import render
from longtake.engine.mini.teacher_forcing import Layout
from longtake.engine.mini.world import FPS, RING_PX, build_worlds
from longtake.engine.vae import load_vae

CLIP_BLOCKS, BLOCK_FRAMES = 40, 3
NUM_PROMPTS, TEXT_LEN = 3, 128
BEGINNING_BLOCKS = 4
LATENT_SHAPE = (16, 12, 20)
_CLIPS_AT_ONCE, _BEGINNINGS_AT_ONCE = 8, 32
_REFRESH_STEPS = 16
_MAX_GAP_LATENTS = 240
_SEEDS_A_RANK = 1_000_000
_FIRST_SEED, _FIRST_BEGINNING = 1, 5_000_001


def num_frames(blocks: int) -> int:
    """Frames of a clip of so many blocks: the first latent holds one, any other four."""
    return 1 + 4 * (blocks * BLOCK_FRAMES - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Some sequences: latents, where their blocks stand in time, prompts and which block is under which.

    ``askable_BN`` marks the blocks that can be asked for: those with a past, and the first ones of clips. (A first
    latent holds one frame, any other four: a model that learns to begin a film anywhere begins some of them wrongly.)
    """

    latents_BCFYX: Tensor
    starts_BN: Tensor
    askable_BN: Tensor
    tokens_BNK: Tensor
    text_mask: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Clips:
    """Some whole clips: latents, prompts and which block is under which."""

    latents_BCFYX: Tensor
    tokens_BPK: Tensor
    prompt_BQ: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """Some new clips, and the event after which they are there."""

    latents: Tensor
    scripts: list[Script]
    ready: torch.cuda.Event | None


class ClipBuffer:
    """A ring buffer of encoded clips on the device.

    New ones are made by a thread on a stream of its own: drawing worlds and launching their many kernels takes as long
    as a few training steps.

    Args:
        vae: folder of the trained VAE.
        capacity: clips kept.
        device: of the buffer; rendering and encoding happen there too.
        blocks: of a clip.
        at_once: clips made at a time.
        first_seed: of the first world; each clip has its own.
        refresh_steps: steps between two makings.
    """

    def __init__(
        self,
        vae: Path,
        capacity: int,
        device: torch.device,
        *,
        blocks: int = CLIP_BLOCKS,
        at_once: int = _CLIPS_AT_ONCE,
        first_seed: int = _FIRST_SEED,
        refresh_steps: int = _REFRESH_STEPS,
    ) -> None:
        channels, rows, columns = LATENT_SHAPE
        on_gpu = device.type == "cuda"
        self._device, self._capacity, self._blocks, self._at_once = device, capacity, blocks, at_once
        self._vae = load_vae(vae, dtype=torch.bfloat16 if on_gpu else torch.float32, device=device)
        self._vae.requires_grad_(False)
        convolution = "conv3d channels last" if on_gpu else "conv2d"
        self.autoencoder = ClipForward(self._vae, convolution=convolution, fuse=on_gpu)
        self._latents = torch.empty(
            capacity, blocks, channels, BLOCK_FRAMES, rows, columns, dtype=torch.bfloat16, device=device
        )
        self._tokens = torch.zeros(capacity, NUM_PROMPTS, TEXT_LEN, dtype=torch.int64, device=device)
        self._prompt_of_block = torch.zeros(capacity, blocks, dtype=torch.int64, device=device)
        self._calls, self._refresh_steps, self._next_seed = 0, refresh_steps, first_seed
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._thread = ThreadPoolExecutor(1, "clips")
        self._making: Future[_Made] | None = None
        self.num_made = 0

    def fill(self, count: int) -> None:
        """Make ``count`` clips now."""
        for _ in range(0, count, self._at_once):
            self._begin()
            self._take()

    def refresh(self) -> None:
        """Take the clips that were begun last time, and begin some more; called once a step, does so now and then."""
        self._calls += 1
        if self._calls % self._refresh_steps == 0:
            self._take()
            self._begin()

    def _begin(self) -> None:
        seeds = list(range(self._next_seed, self._next_seed + self._at_once))
        self._next_seed += self._at_once
        self._making = self._thread.submit(self._make, seeds)

    @torch.no_grad()
    def _make(self, seeds: list[int]) -> _Made:
        with torch.cuda.stream(self._stream):
            latents, scripts = make_clips(seeds, self.autoencoder, num_frames(self._blocks), self._device)
            blocks = latents.unflatten(2, (self._blocks, BLOCK_FRAMES)).transpose(1, 2).bfloat16()
            finite = blocks.isfinite().flatten(1).all(1)
            if not finite.all():
                left_out = [seed for seed, good in zip(seeds, finite.tolist(), strict=True) if not good]
                print(f"clips of seeds {left_out} are not finite: left out", flush=True)
                scripts = [script for script, good in zip(scripts, finite.tolist(), strict=True) if good]
                blocks = blocks[finite]
            ready = torch.cuda.Event() if self._stream is not None else None
            if ready is not None:
                ready.record()
        return _Made(latents=blocks, scripts=scripts, ready=ready)

    def _take(self) -> None:
        if self._making is None:
            return
        made, self._making = self._making.result(), None
        if made.ready is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(made.ready)
            made.latents.record_stream(current)
        rows = [(self.num_made + index) % self._capacity for index in range(len(made.scripts))]
        self._latents[rows] = made.latents
        self._tokens[rows] = script_tokens(made.scripts).to(self._device)
        prompts = [prompt_of_block(script, self._blocks) for script in made.scripts]
        self._prompt_of_block[rows] = torch.tensor(prompts, device=self._device)
        self.num_made += len(made.scripts)

    def sample(self, batch: int, layout: Layout) -> Batch:
        """Draw ``batch`` sequences of ``layout.num_blocks`` blocks."""
        available = min(self.num_made, self._capacity)
        clip_B = torch.randint(0, available, (batch,), device=self._device)
        block_BN = choose_blocks(batch, layout.num_blocks, self._blocks, self._device)
        starts_BN = place_blocks(block_BN)
        latents = self._latents[clip_B[:, None], block_BN].transpose(1, 2).flatten(2, 3)
        prompt_BN = self._prompt_of_block[clip_B].gather(1, block_BN)
        return Batch(
            latents_BCFYX=latents,
            starts_BN=starts_BN,
            askable_BN=(block_BN == 0) | (torch.arange(layout.num_blocks, device=self._device) > 0),
            tokens_BNK=self._tokens[clip_B],
            text_mask=text_mask(prompt_BN, layout, NUM_PROMPTS, TEXT_LEN),
        )

    def sample_clips(self, batch: int) -> Clips:
        """Draw ``batch`` whole clips."""
        clip_B = torch.randint(0, min(self.num_made, self._capacity), (batch,), device=self._device)
        return Clips(
            latents_BCFYX=self._latents[clip_B].transpose(1, 2).flatten(2, 3),
            tokens_BPK=self._tokens[clip_B],
            prompt_BQ=self._prompt_of_block[clip_B],
        )


def shared_clips(vae: Path, capacity: int, device: torch.device, ranks: Ranks) -> ClipBuffer:
    """A rank's part of a buffer of long clips, and of the work to renew it; its worlds are its own."""
    return ClipBuffer(
        vae,
        capacity // ranks.size,
        device,
        first_seed=_FIRST_SEED + ranks.index * _SEEDS_A_RANK,
        refresh_steps=_REFRESH_STEPS * ranks.size,
    )


def shared_beginnings(vae: Path, capacity: int, device: torch.device, ranks: Ranks) -> ClipBuffer:
    """The same of beginnings."""
    return ClipBuffer(
        vae,
        capacity // ranks.size,
        device,
        blocks=BEGINNING_BLOCKS,
        at_once=_BEGINNINGS_AT_ONCE,
        first_seed=_FIRST_BEGINNING + ranks.index * _SEEDS_A_RANK,
        refresh_steps=_REFRESH_STEPS * ranks.size,
    )


def text_mask(prompt_BN: Tensor, layout: Layout, num_prompts: int, text_len: int) -> Tensor:
    """Which text tokens each token of the doubled sequence sees: those of its block's prompt; bool [B, 1, T, P * K]."""
    prompt_BT = prompt_BN.repeat_interleave(layout.block_tokens, dim=1).repeat(1, 2)
    prompt_of_token = torch.arange(num_prompts, device=prompt_BN.device).repeat_interleave(text_len)
    return (prompt_BT[:, :, None] == prompt_of_token)[:, None]


def make_clips(
    seeds: list[int], forward: ClipForward, frames: int, device: torch.device
) -> tuple[Tensor, list[Script]]:
    """Render and encode the first frames of one clip a seed: normalised latents [M, C, F, Y, X] and the scripts."""
    worlds = build_worlds(seeds)
    start_angle = np.array([(seed * 7919) % RING_PX for seed in seeds], dtype=np.float64)
    scripts = random_scripts(worlds, start_angle, num_frames(CLIP_BLOCKS) / FPS, seeds, max_beats=NUM_PROMPTS)
    staged = stage(worlds, scripts, start_angle).to(device)
    paths = [camera_path(s, frames, float(a)) for s, a in zip(scripts, start_angle, strict=True)]
    angle = torch.from_numpy(np.stack(paths)).to(device)
    time_s = (torch.arange(frames, dtype=torch.float64, device=device) / FPS).expand(len(seeds), -1)
    video = render(staged, angle, time_s, frames_at_once=2048)
    return encode_clips(forward, video), scripts


def script_tokens(scripts: list[Script]) -> Tensor:
    """Token ids of the scripts' prompts: int64 [M, P, K], zeros for prompts that a script does not have."""
    out = torch.zeros(len(scripts), NUM_PROMPTS, TEXT_LEN, dtype=torch.int64)
    for row, script in enumerate(scripts):
        for column, beat in enumerate(script):
            out[row, column] = torch.from_numpy(tokens(beat.prompt, TEXT_LEN).astype(np.int64))
    return out


def prompt_of_block(script: Script, blocks: int) -> list[int]:
    """Index of the prompt in force for each of a clip's ``blocks``; beats fall on blocks."""
    first_block = [round(beat.at_s / BEAT_GRID_S) for beat in script]
    return [max(p for p, first in enumerate(first_block) if first <= block) for block in range(blocks)]


def choose_blocks(batch: int, count: int, blocks: int, device: torch.device) -> Tensor:
    """Which ``count`` of a clip's ``blocks`` make a sequence: int64 [B, N], ascending.

    Half are runs, half of those from the clip's start. The others end anywhere, with a recent run of 4 to 12 blocks,
    and are filled up with blocks from before it, with the clip's first one in most.
    """
    rank_BQ = torch.arange(blocks, device=device).expand(batch, -1)

    def uniform() -> Tensor:
        return torch.rand(batch, 1, device=device)

    first = (uniform() * (blocks - count + 1)).floor().long() * (uniform() < 0.5)
    run_BN = first + torch.arange(count, device=device)
    last = count - 1 + (uniform() * (blocks - count + 1)).floor().long()
    recent = last - 4 - (uniform() * 9).floor().long()
    score = torch.rand(batch, blocks, device=device)
    score = score + 2.0 * (rank_BQ > recent) + 3.0 * ((rank_BQ == 0) & (uniform() < 0.7))
    score = score.masked_fill(rank_BQ > last, -1.0)
    sparse_BN = score.topk(count, dim=1).indices.sort(dim=1).values
    return torch.where(uniform() < 0.5, run_BN, sparse_BN)


def place_blocks(block_BN: Tensor) -> Tensor:
    """Where the chosen blocks stand in time: latent-frame positions, int64 [B, N].

    At their true places (half of them), closed up from 0 (30 %), or with one long gap (the rest).
    """
    batch, count = block_BN.shape
    device = block_BN.device
    true = block_BN * BLOCK_FRAMES
    closed = torch.arange(count, device=device).expand(batch, -1) * BLOCK_FRAMES
    after = torch.arange(count, device=device) >= 1 + (torch.rand(batch, 1, device=device) * (count - 1)).floor()
    gapped = true + after * (torch.rand(batch, 1, device=device) * _MAX_GAP_LATENTS).floor().long()
    kind = torch.rand(batch, 1, device=device)
    return torch.where(kind < 0.5, true, torch.where(kind < 0.8, closed, gapped))
