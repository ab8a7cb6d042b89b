"""The family's loops, plain: every published rollout as its project describes it, over dense K/V and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longtake.engine.config import ModelConfig
from longtake.engine.noise import block_noise
from tests.engine.plain_wan import KV, State, forward


def sigmas_of(timesteps: Sequence[float], shift: float) -> list[float]:
    return [shift * (t / 1000) / (1 + (shift - 1) * (t / 1000)) for t in timesteps]


@dataclass
class Film:
    """What all loops need. ``text(block)`` is the prompt's embedding [K, E] of a block."""

    state: State
    config: ModelConfig
    shape: tuple[int, int, int, int]
    seed: int
    name: str
    text: Callable[[int], Tensor]
    kv: dict[int, KV] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        return self.shape[1]

    def noise(self, block: int, step: int) -> Tensor:
        return block_noise(self.seed, self.name, block, step, self.shape)

    def run(
        self, latents: Tensor, timesteps: Sequence[float], text: Tensor, start: int, seen: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, KV]:
        """Flow and K/V of frames from position ``start`` on that see blocks at starts: [(block, start)]."""
        history = [(self.kv[block], range(at, at + self.frames)) for block, at in seen]
        positions = range(start, start + latents.shape[1])
        return forward(self.state, self.config, latents, timesteps, text, positions, history)

    def denoise(
        self,
        block: int,
        sigmas: Sequence[float],
        start: int,
        seen: Sequence[tuple[int, int]],
        fixed: Tensor | None = None,
        guide: Tensor | None = None,
    ) -> Tensor:
        clean = guide
        for step, sigma in enumerate(sigmas):
            noise = self.noise(block, step)
            noisy = noise if clean is None else (1 - sigma) * clean + sigma * noise
            times = [1000 * sigma] * self.frames
            if fixed is not None:
                noisy[:, : fixed.shape[1]] = fixed
                times[: fixed.shape[1]] = [0.0] * fixed.shape[1]
            clean = noisy - sigma * self.run(noisy, times, self.text(block), start, seen)[0]
            if fixed is not None:
                clean[:, : fixed.shape[1]] = fixed
        assert clean is not None
        return clean

    def commit(self, block: int, clean: Tensor, text: Tensor, start: int, seen: Sequence[tuple[int, int]]) -> None:
        self.kv[block] = self.run(clean, [0.0] * self.frames, text, start, seen)[1]


def closed_up(blocks: Sequence[int], frames: int) -> list[tuple[int, int]]:
    return [(block, index * frames) for index, block in enumerate(blocks)]


def come_back(film: Film, block: int, first: int, may: range, count: int) -> list[int]:
    """Those of ``may`` whose neighbours before, or behind in reverse, have first keys most like the last two blocks'.

    Only blocks from ``first`` on are compared; a distance counts as a part of its head's mean, of equals the newest.
    """
    means = {other: film.kv[other][0][0].mean(0) for other in range(first, block)}

    def distances(last: int) -> dict[int, float]:
        heads = {other: (mean - means[last]).square().sum(-1) for other, mean in means.items()}
        average = torch.stack(list(heads.values())).mean(0)
        return {other: float((found / average).sum()) for other, found in heads.items()}

    one, two = distances(block - 1), distances(block - 2)
    scores = {}
    for other in may:
        scores[other] = one[max(first, other - 1)] + two[max(first, other - 2)]
        if other + 2 < block - 2:
            scores[other] = min(scores[other], one[other + 1] + two[other + 2])
    return sorted(sorted(may, key=lambda other: (scores[other], -other))[:count])


def windowed(
    film: Film,
    num_blocks: int,
    sigmas: Sequence[float],
    sink: int,
    recent: int,
    switch: int,
    how: str,
    retrieve: int = 0,
) -> Tensor:
    """Sink and window, closed up from 0 at every block; ``how`` says what block ``switch`` does to the history."""
    cleans: list[Tensor] = []
    first = 0
    for block in range(num_blocks):
        if block == switch and how == "recache":
            replayed: list[int] = []
            sinks = list(range(min(sink, block)))
            for old in range(max(sink, block - recent), block):
                seen = closed_up([*sinks, *replayed], film.frames)
                film.commit(old, cleans[old], film.text(block), len(seen) * film.frames, seen)
                replayed.append(old)
        if block == switch and how == "flush":
            first = block - 1
        window = [b for b in range(block) if b < sink or b >= max(first, block - recent)]
        if may := range(max(sink, first), block - recent) if retrieve else range(0):
            window = sorted(window + come_back(film, block, first, may, retrieve))
        seen, start = closed_up(window, film.frames), len(window) * film.frames
        cleans.append(film.denoise(block, sigmas, start, seen))
        film.commit(block, cleans[block], film.text(block), start, seen)
    return torch.stack(cleans)


def rebuilt(film: Film, num_blocks: int, sigmas: Sequence[float], context: int) -> Tensor:
    """Krea: before each block K/V of the last clean blocks from nothing, in order; none of the block's own is kept."""
    cleans: list[Tensor] = []
    for block in range(num_blocks):
        film.kv = {}
        past = list(range(max(0, block - context), block))
        for index, old in enumerate(past):
            # under the prompt that was current when the context was computed: right after the block before this one
            film.commit(
                old, cleans[old], film.text(block - 1), index * film.frames, closed_up(past[:index], film.frames)
            )
        cleans.append(film.denoise(block, sigmas, len(past) * film.frames, closed_up(past, film.frames)))
    return torch.stack(cleans)


def rolling(film: Film, num_blocks: int, sigmas: Sequence[float], sink: int, total: int) -> Tensor:
    """Rolling Forcing, over whole arrays: ``total`` blocks are seen at most, the sink stands right before the rest."""
    num_steps, frames = len(sigmas), film.frames
    noisy: dict[int, Tensor] = {}
    output: dict[int, Tensor] = {}

    def seen_from(first: int, own: int) -> list[tuple[int, int]]:
        recent = max(0, total - sink - own)
        blocks = [b for b in range(first) if b < sink or b >= first - recent]
        return [(b, (first - len(blocks) + index) * frames) for index, b in enumerate(blocks)]

    for window in range(num_blocks + num_steps - 1):
        first, last = max(0, window - num_steps + 1), min(num_blocks - 1, window)
        blocks = list(range(first, last + 1))
        if last == window:
            noisy[last] = film.noise(last, 0)
        level = {b: window - b for b in blocks}
        latents = torch.cat([noisy[b] for b in blocks], dim=1)
        times = [1000 * sigmas[level[b]] for b in blocks for _ in range(frames)]
        flow, _ = film.run(latents, times, film.text(first), first * frames, seen_from(first, len(blocks)))
        for index, b in enumerate(blocks):
            part = flow[:, index * frames : (index + 1) * frames]
            output[b] = noisy[b] - sigmas[level[b]] * part
            if level[b] + 1 < num_steps:
                sigma = sigmas[level[b] + 1]
                noisy[b] = (1 - sigma) * output[b] + sigma * film.noise(b, level[b] + 1)
        if window >= num_steps - 1:
            film.commit(first, output[first], film.text(first), first * frames, seen_from(first, 1))
    return torch.stack([output[b] for b in range(num_blocks)])
