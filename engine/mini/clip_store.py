"""Clips of random worlds for training the VAE, rendered many at a time and kept on the device in eight bits.

Rendering is some hundred small kernels and a few waits whatever the number of frames: thousands of frames cost hardly
more than hundreds. Shapes: see world.py; a clip is [3, T, Y, X] in [-1, 1]; M clips are kept.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .draws import choice, uniform
from .panorama import Panorama, paint
from .render import render
from .world import FPS, HEIGHT, NEVER_S, NUM_EVENTS, RING_PX, WIDTH, WorldSpec, build_worlds

MAX_SPEED = 4
_FRAMES_AT_ONCE = 4160


def random_worlds(seeds: list[int], device: torch.device) -> WorldSpec:
    """Make worlds of which every third changes light or weather at 3 s."""
    worlds = build_worlds(seeds)
    u = uniform(seeds, "change", 3)
    times, weathers = worlds.event_time_WE.numpy().copy(), worlds.event_weather_WE.numpy().copy()
    moments = np.full((len(seeds), NUM_EVENTS), NEVER_S)
    moments[:, 0] = 0.0
    moments[:, 1] = np.where(u[:, 0] < 1 / 3, 3.0, NEVER_S)
    times[:, 1:], weathers[:, 1:] = choice(u[:, 1:2], 4), choice(u[:, 2:3], 4)
    return worlds.set_events(moments, times, weathers).to(device)


class Pool:
    """Painted worlds on the device, from which clips are cut."""

    def __init__(self, seeds: list[int], device: torch.device, worlds: WorldSpec | None = None) -> None:
        self.worlds = random_worlds(seeds, device) if worlds is None else worlds.to(device)
        parts = [
            paint(self.worlds.take(torch.arange(n, min(n + 64, len(seeds)), device=device)))
            for n in range(0, len(seeds), 64)
        ]
        self.painted = Panorama(
            far_WNCY=torch.cat([p.far_WNCY for p in parts]),
            mid_WNCY=torch.cat([p.mid_WNCY for p in parts]),
            near_WNCY=torch.cat([p.near_WNCY for p in parts]),
        )

    def frames(self, index: Tensor, angle_px: Tensor, time_s: Tensor) -> Tensor:
        """Render clips of the worlds at `index` [R]; angle_px and time_s [R, T]; returns [R, T, 3, Y, X] in [0, 1]."""
        index = index.to(self.worlds.seeds_W.device)
        return render(
            self.worlds.take(index),
            angle_px,
            time_s,
            painted=self.painted,
            painted_row_W=index,
            frames_at_once=_FRAMES_AT_ONCE if self.worlds.seeds_W.is_cuda else 640,
        )

    def cut(self, index: Tensor, angle_px: Tensor, time_s: Tensor) -> Tensor:
        """Render clips as `frames` does, but as the VAE takes them: [R, 3, T, Y, X] in [-1, 1]."""
        return self.frames(index, angle_px, time_s).transpose(1, 2).contiguous() * 2 - 1


def random_cameras(count: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw camera paths of whole pixels a frame, half of them changing speed once; angle [count, frames], time in s."""

    def speeds() -> Tensor:
        return torch.randint(-MAX_SPEED, MAX_SPEED + 1, (count, 1), generator=generator)

    first, second = speeds(), speeds()
    change = torch.randint(0, 2 * frames, (count, 1), generator=generator)
    step = torch.where(torch.arange(frames) < change, first, second)
    angle = torch.randint(0, RING_PX, (count, 1), generator=generator) + torch.cumsum(step, 1)
    start = torch.randint(0, 6 * FPS, (count, 1), generator=generator)
    return angle.double(), (start + torch.arange(frames)).double() / FPS


class ClipStore:
    """A ring buffer of clips, each of a world of its own; shorter clips are cut from them at random.

    Args:
        capacity: clips kept.
        frames: of each.
        at_once: clips rendered by one `make`; divides `capacity`.
        device: of everything.
        first_seed: of the first world.
        workers: processes that draw the worlds ahead (some 4 ms of Python each); 0: drawn when they are wanted.
    """

    def __init__(
        self, capacity: int, frames: int, at_once: int, device: torch.device, *, first_seed: int = 1, workers: int = 0
    ) -> None:
        if capacity % at_once:
            raise ValueError(f"{at_once} clips at once do not divide a store of {capacity}")
        self._clips_MT3YX = torch.empty(capacity, frames, 3, HEIGHT, WIDTH, dtype=torch.uint8, device=device)
        self._at_once, self._device, self._first_seed = at_once, device, first_seed
        self.num_made = 0
        self._ahead: deque[Future[WorldSpec]] = deque()
        self._workers = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) if workers else None
        for number in range(2 * workers):
            self._draw_ahead(number)

    def close(self) -> None:
        """Let the clips and the processes go."""
        if self._workers is not None:
            self._workers.shutdown(wait=False, cancel_futures=True)
        self._clips_MT3YX = self._clips_MT3YX[:0].clone()

    def _seeds(self, number: int) -> list[int]:
        first = self._first_seed + self.num_made + number * self._at_once
        return list(range(first, first + self._at_once))

    def _draw_ahead(self, number: int) -> None:
        if self._workers is not None:
            self._ahead.append(self._workers.submit(random_worlds, self._seeds(number), torch.device("cpu")))

    @torch.no_grad()
    def make(self, generator: torch.Generator) -> None:
        """Render `at_once` clips of new worlds over the oldest ones."""
        capacity, frames = self._clips_MT3YX.shape[:2]
        seeds = self._seeds(0)
        self._draw_ahead(len(self._ahead))
        drawn = self._ahead.popleft() if self._ahead else None  # processes that still start are not waited for
        pool = Pool(seeds, self._device, drawn.result() if drawn is not None and drawn.done() else None)
        angle, seconds = random_cameras(self._at_once, frames, generator)
        video = pool.frames(torch.arange(self._at_once), angle, seconds)
        row = self.num_made % capacity
        self._clips_MT3YX[row : row + self._at_once] = video.mul_(255).round_().to(torch.uint8)
        self.num_made += self._at_once

    def sample(self, clips: int, frames: int, generator: torch.Generator) -> Tensor:
        """Cut clips at random, mirrored every other time; float32 [clips, 3, frames, Y, X] in [-1, 1].

        The memory's order is the store's, frame by frame; nothing waits for the device.
        """
        capacity, longest = self._clips_MT3YX.shape[:2]
        row = torch.randint(0, min(self.num_made, capacity), (clips, 1), generator=generator)
        start = torch.randint(0, longest - frames + 1, (clips, 1), generator=generator)
        index = torch.stack([row.expand(-1, frames), start + torch.arange(frames)])
        if self._device.type == "cuda":
            index = index.pin_memory()
        index = index.to(self._device, non_blocking=True)
        video = self._clips_MT3YX[index[0], index[1]].float().mul_(2 / 255).sub_(1).transpose(1, 2)
        return video.flip(-1) if bool(torch.rand((), generator=generator) < 0.5) else video
