"""The worlds that ``longtake bench methods`` shows to every method, and what a method makes of one.

What all methods are compared with, bfloat16's film and blocks and the world itself, is made once for each world and
kept in a file, which every process that measures methods reads.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.engine.bench_memory import Case, Models, film_truth, load, make_shot, plain_script
from longtake.engine.config import ShotConfig
from longtake.engine.ledger import reset_peak
from longtake.engine.methods import Method, methods
from longtake.engine.mini.prompts import Script
from longtake.engine.model import TextContext
from longtake.engine.quality import psnr, ssim
from longtake.engine.rollout import Prefix, Rollout
from longtake.engine.shotcache import cache_budgets, kv_shape, open_cache, with_table
from longtake.engine.timeline import Timeline
from longtake.engine.timing import await_device
from longtake.engine.vae import StreamingDecoder, StreamingEncoder, from_uint8, receptive_latents

PAN_PX = 4
MOMENTS_S = (2, 10, 60)
PAST_BLOCKS = 2
UNTIMED_BLOCKS, TIMED_BLOCKS = 3, 4  # a pass is recorded when it was seen before, and then replayed
REFERENCE = "BF16"
COMPARE = {"psnr_db": psnr, "ssim": ssim}
_DECIMALS = 5
_NO_PREFIX = Prefix()


class Part(Enum):
    """What of a method in a world is measured together."""

    REFERENCE = "film and past of what all are compared with, which comes first in a world"
    FILM = "film"
    PAST = "past"
    BLOCKS = "seconds a block"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One method in one world.

    Args:
        method: its name.
        seed: of the world.
        part: what is measured.
    """

    method: str
    seed: int
    part: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """How a process makes its stage.

    Args:
        model: a name or a folder.
        device: "cpu", or "cuda": the processes take the GPUs in turn.
        seconds: of the films.
        folder: of the references.
    """

    model: str
    device: str
    seconds: float
    folder: Path

    @property
    def num_devices(self) -> int:
        """What the processes share."""
        return torch.cuda.device_count() if self.device == "cuda" else 1

    def __call__(self, index: int) -> Stage:
        """The stage of the process of that number."""
        device = torch.device(self.device)
        if device.type == "cuda":
            device = torch.device("cuda", index % self.num_devices if device.index is None else device.index)
            torch.cuda.set_device(device)
        return Stage(load(self.model, device), self.seconds, self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What other methods are compared with in one world; all on the CPU.

    Args:
        latents: of the world's own film, float32 [C, F, Y, X].
        film: of bfloat16, uint8 [N, Y, X, C].
        pasts: by moment the blocks that bfloat16 generates from a true history, and the truth, likewise.
    """

    latents: Tensor
    film: Tensor
    pasts: dict[int, tuple[Tensor, Tensor]]


def moments(seconds: float) -> list[int]:
    """The seconds that are looked at in films of that length."""
    return [moment for moment in MOMENTS_S if moment <= seconds] or [int(seconds)]


class Stage:
    """One process's model and worlds; called with a task it measures a method.

    Args:
        models: mini's parts.
        seconds: of the films.
        folder: of the references.
    """

    def __init__(self, models: Models, seconds: float, folder: Path) -> None:
        self.models, self.seconds = models, seconds
        self._folder = folder
        self._block_frames = models.spec.block_frames * models.spec.temporal_stride
        self._references: dict[int, Reference] = {}
        self._embeds: dict[int, Tensor] = {}  # on the CPU: a peak counts one film's alone

    @torch.inference_mode()
    def __call__(self, task: Task) -> dict[str, Any]:
        """What a method makes of one world, or its seconds a block; units are in the names."""
        method = methods()[task.method]
        if task.part is Part.BLOCKS:
            return {"block_s": self._block_s(method, task.seed)}
        if task.part is Part.REFERENCE:
            row, film = self._film(method, task.seed)
            self._make_reference(task.seed, film)
            return row | self._film_row(task.seed, film) | self._past_row(method, task.seed)
        if task.part is Part.PAST:
            return self._past_row(method, task.seed)
        row, film = self._film(method, task.seed)
        return row | self._film_row(task.seed, film)

    # -- films from the prompt alone

    def _film(self, method: Method, seed: int) -> tuple[dict[str, Any], Tensor]:
        """Bytes by name, and the frames, uint8 [N, Y, X, C] on the CPU."""
        spec, device = self.models.spec, self.models.device
        gc.collect()  # nothing of an earlier film counts
        num_blocks = self._film_blocks(self.seconds)
        rollout = self._rollout(method, seed, num_blocks)
        decoder, frames, peak_bytes = StreamingDecoder(self.models.vae), [], 0
        for _ in range(num_blocks):
            reset_peak(device)
            clean = rollout.step()
            await_device(device)
            peak_bytes = max(peak_bytes, reset_peak(device) or sum(rollout.memory().values()))
            frames.append(decoder.decode(clean).cpu())
        memory, bits = rollout.memory(), rollout.codec.bits_per_element
        rollout.close()
        row = {
            "encoded_bits": bits,
            "memory_bytes": memory,
            "peak_bytes": peak_bytes,
            "minute_bytes": self._arena_bytes(method, seed, 60),
        }
        return row, torch.cat(frames)[: round(self.seconds * spec.fps)]

    def _film_row(self, seed: int, film: Tensor) -> dict[str, Any]:
        """By second, against bfloat16's."""
        curves = {name: self._compare(name, film, self._reference(seed).film) for name in COMPARE}
        fps = self.models.spec.fps
        return {"film": {name: [_mean(second) for second in curve.split(fps)] for name, curve in curves.items()}}

    # -- blocks behind a true past

    def _past_row(self, method: Method, seed: int) -> dict[str, Any]:
        """By moment, against the world and bfloat16's."""
        found = {}
        for moment, (bf16, truth) in self._reference(seed).pasts.items():
            clip = bf16 if method.name == REFERENCE else self._past(method, seed, moment)
            against = {"world": truth, "bf16": bf16}
            found[str(moment)] = {
                f"{who}_{name}": _mean(self._compare(name, clip, against[who])) for who in against for name in COMPARE
            }
        return {"past": found}

    def _past(self, method: Method, seed: int, moment: int) -> Tensor:
        """The blocks generated from a true history, uint8 [N, Y, X, C] on the CPU."""
        past = self._true_past(seed, self._past_blocks(moment))
        rollout = self._rollout(method, seed, PAST_BLOCKS, past)
        clean = [rollout.step() for _ in range(rollout.total_blocks)][len(past.latents) :]
        rollout.close()
        decoder = StreamingDecoder(self.models.vae)
        decoder.warm_up(torch.cat(past.latents, dim=1)[:, -receptive_latents(self.models.vae) :])
        return decoder.decode(torch.cat(clean, dim=1)).cpu()

    def _block_s(self, method: Method, seed: int) -> list[float]:
        """Seconds of single blocks behind a full window, or the past that there is."""
        window = self.models.spec.history.sink_blocks + self.models.spec.history.recent_blocks
        past = self._true_past(seed, min(window + 1, self._past_blocks(moments(self.seconds)[-1])))
        rollout = self._rollout(method, seed, UNTIMED_BLOCKS + TIMED_BLOCKS, past)
        block_s = []
        for _ in range(rollout.total_blocks):
            await_device(self.models.device)
            started = time.perf_counter()
            rollout.step()
            await_device(self.models.device)
            block_s.append(time.perf_counter() - started)
        rollout.close()
        return block_s[-TIMED_BLOCKS:]

    def _true_past(self, seed: int, num_blocks: int) -> Prefix:
        spec = self.models.spec
        latents = self._reference(seed).latents[:, : num_blocks * spec.block_frames].to(self.models.device)
        return Prefix(latents=latents.split(spec.block_frames, dim=1))

    # -- references

    def _reference(self, seed: int) -> Reference:
        if seed not in self._references:
            self._references[seed] = torch.load(self._path(seed), weights_only=False)
        return self._references[seed]

    def _make_reference(self, seed: int, film: Tensor) -> None:
        """Render what bfloat16 makes of a world, and the world; for all processes."""
        spec, device = self.models.spec, self.models.device
        last = moments(self.seconds)[-1]
        num_latents = (self._past_blocks(last) + PAST_BLOCKS) * spec.block_frames
        truth = film_truth(seed, self._script(seed), 1 + (num_latents - 1) * spec.temporal_stride, device)
        latents = StreamingEncoder(self.models.vae).encode_float(from_uint8(truth)).cpu()
        pasts: dict[int, tuple[Tensor, Tensor]] = {}
        self._references[seed] = Reference(latents=latents, film=film, pasts=pasts)
        for moment in moments(self.seconds):
            clip = self._past(methods()[REFERENCE], seed, moment)
            first = 1 + (self._past_blocks(moment) * spec.block_frames - 1) * spec.temporal_stride
            pasts[moment] = clip, truth[first : first + len(clip)].cpu()
        torch.save(self._references[seed], self._path(seed))

    def _path(self, seed: int) -> Path:
        return self._folder / f"{seed}.pt"

    # -- shots

    def _compare(self, name: str, clip: Tensor, other: Tensor) -> Tensor:
        """By frame, on the CPU."""
        return COMPARE[name](clip.to(self.models.device), other.to(self.models.device)).cpu()

    def _arena_bytes(self, method: Method, seed: int, seconds: float) -> int:
        """What the cache of a film of that length would take on the device."""
        shot = self._shot(method, seed, self._film_blocks(seconds), 0)
        budgets = cache_budgets(shot, Timeline(shot, 0))
        shapes = [kv_shape(shot, form=form) for form in range(len(budgets))]
        return sum(budget.num_frames(shape) * shape.block_bytes for budget, shape in zip(budgets, shapes, strict=True))

    def _film_blocks(self, seconds: float) -> int:
        """Blocks of a film; the first shows fewer frames than the others."""
        return -(-round(seconds * self.models.spec.fps) // self._block_frames) + 1

    def _past_blocks(self, moment: int) -> int:
        return max(1, round(moment * self.models.spec.fps / self._block_frames))

    def _script(self, seed: int) -> Script:
        return plain_script(seed, PAN_PX)

    def _rollout(self, method: Method, seed: int, num_blocks: int, prefix: Prefix = _NO_PREFIX) -> Rollout:
        num_prefix = len(prefix.latents)
        shot = self._shot(method, seed, num_blocks, num_prefix)
        cache = open_cache(shot, self.models.device, num_prefix)
        return Rollout(shot, self.models.transformer, self._context(seed), cache, prefix)

    def _shot(self, method: Method, seed: int, num_blocks: int, num_prefix: int) -> ShotConfig:
        case = Case(name=method.name, history=self.models.spec.history, codec="bf16")
        shot = make_shot(self.models, seed, self._script(seed), case, num_blocks, num_prefix)
        return with_table(method.applied_to(shot))

    def _context(self, seed: int) -> list[TextContext]:
        if seed not in self._embeds:
            self._embeds[seed] = self.models.text.encode(self._script(seed)[0].prompt)[None].cpu()
        return [self.models.transformer.text_context(self._embeds[seed].to(self.models.device))]


def _mean(values: Tensor) -> float:
    return round(float(values.mean()), _DECIMALS)
