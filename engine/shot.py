"""One shot from its configuration to segments of video, from the start or from wherever an earlier run left it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longtake.engine.config import Keep, ModelSpec, ShotConfig
from longtake.engine.emitter import Emitter, Start
from longtake.engine.gang import Gang
from longtake.engine.gang_shot import RankFolder, ReadWindows, follow, resting
from longtake.engine.metrics import MetricsLog
from longtake.engine.model import CausalWan
from longtake.engine.place import place
from longtake.engine.prompts import Prompts, make_prompts
from longtake.engine.retention import Retention
from longtake.engine.rolling import WindowStore
from longtake.engine.rollout import Prefix, Rollout
from longtake.engine.shotcache import open_cache
from longtake.engine.shotfolder import METRICS_NAME, WINDOW_NAME, ShotFolder, shot_latents
from longtake.engine.start import clip_latents, last_frame_latents, picture_latents, write_guide
from longtake.engine.streams import going_first
from longtake.engine.text import TextEncoder
from longtake.engine.timing import NO_TIMER, StageClock
from longtake.engine.vae import StreamingDecoder, StreamingEncoder, load_vae, receptive_latents
from longtake.engine.vae_fast import make_fast
from longtake.engine.vae_stripes import StripedDecoder, StripeWorker
from longtake.engine.weights import load_transformer
from longtake.kernels.errors import ConfigError, StorageError

PROMPTS_NAME = ".prompts"  # no shot can have this name


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockProgress:
    """Where a shot stands after a block; counts include it. ``frames_done`` are those decoded, which may lag.

    ``seconds_block`` is 0 in the report of a shot that goes on: where it begins.
    """

    block: int
    num_blocks: int
    frames_done: int
    num_frames: int
    seconds_block: float
    device_cache_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShotResult:
    """How a shot ended: ``finished``, or stopped at a block boundary; its complete segments in order."""

    finished: bool
    segments: tuple[Path, ...]


def parse_device(name: str) -> torch.device:
    """The device of a name such as cpu, cuda or cuda:1.

    Raises:
        ConfigError: it is not there.
    """
    if name == "cpu":
        return torch.device("cpu")
    if name.split(":")[0] != "cuda":
        raise ConfigError(f"unknown device {name!r}; use cpu or cuda")
    if not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} is not there: PyTorch sees no CUDA device; use --device cpu")
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", device.index or 0)


class ShotRenderer:
    """Renders shots, keeping the last model loaded; what ``jobs`` calls. Not thread-safe.

    Args:
        gang: that renders them together, every rank with a renderer of its own; None: this process alone.
    """

    def __init__(self, gang: Gang | None = None) -> None:
        self._gang = gang or Gang()
        self._key: tuple[ModelSpec, str] | None = None
        self._model: CausalWan | None = None
        self._decoder: StreamingDecoder | None = None
        self._worker: StripeWorker | None = None

    def __call__(
        self,
        shot: ShotConfig,
        folder: Path,
        device_name: str,
        *,
        stop: Callable[[], bool],
        progress: Callable[[BlockProgress], None],
    ) -> ShotResult:
        """Render a shot in its folder until it is finished or ``stop`` says so at a block boundary.

        Args:
            shot: what to render; the shot it starts from has its folder beside this one.
            folder: of the shot.
            device_name: cpu or cuda, cuda:N.
            stop: asked before each block.
            progress: told where a shot goes on, and after each block.

        Raises:
            LockedError, ConfigError, CapacityError, DiskFullError, StorageError: see the message. What was committed
                is kept, and no thread is left.
        """
        gang, num_heads = self._gang, shot.model.transformer.num_heads
        device = parse_device(gang.device(device_name))
        heads = gang.mesh_shape(num_heads).heads(gang.rank, num_heads)
        open_folder = ShotFolder if gang.leads else RankFolder
        with going_first(device), open_folder(shot, folder, gang, heads) as files:
            if gang.lead(lambda: files.finished):
                if shot.cache.keep is Keep.NEEDED:
                    for run in files.runs:
                        run.drop(range(run.num_blocks))
                return ShotResult(finished=True, segments=files.paths)
            try:
                model, decoder = self._load(shot.model, device)
                prefix = gang.lead(lambda: read_start(shot, folder, decoder))
                prompts = encode_beats(shot, folder, model, gang)
                clock = StageClock(device)
                with contextlib.closing(open_cache(shot, device, files.num_prefix, files.runs, heads)) as cache:
                    rollout = Rollout(
                        shot,
                        model,
                        prompts,
                        cache,
                        prefix,
                        read_latents=lambda block: files.latents.read(block, block + 1),
                        windows=(WindowStore if gang.leads else ReadWindows)(folder / WINDOW_NAME),
                        stages=clock if gang.leads else NO_TIMER,
                        graphs=place().graphs,
                    )
                    with contextlib.closing(rollout), gang.guard():
                        if isinstance(files, RankFolder):
                            follow(gang, shot, rollout, stop)
                        else:
                            assert decoder is not None
                            _Run(shot, files, rollout, decoder, gang, clock).until(stop, progress)
                        gang.any(False)  # every rank's history is on the disk
            except StorageError as error:
                if (mend := files.mend(error)) is None:
                    raise
                raise StorageError(f"{error.args[0]}; {mend}", block=error.block, path=error.path) from error
            return ShotResult(finished=gang.lead(lambda: files.finished), segments=files.paths)

    def _load(self, spec: ModelSpec, device: torch.device) -> tuple[CausalWan, StreamingDecoder | None]:
        """The model, and on rank 0 the decoder."""
        key = (spec, str(device))
        if self._key != key or self._model is None:
            if isinstance(self._decoder, StripedDecoder):
                self._decoder.close()
            self._model = self._decoder = None
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            self._model = load_transformer(spec, device, dtype, self._gang.mesh(spec.transformer.num_heads))
            if device.type == "cuda":
                self._model.compile_layers()
            vae = load_vae(spec.path / "vae", dtype=dtype, device=device)
            self._decoder = self._make_decoder(make_fast(vae) if device.type == "cuda" else vae)
            self._key = key
        if self._decoder is not None:
            self._decoder.reset()
        return self._model, self._decoder

    def _make_decoder(self, vae: AutoencoderKLWan) -> StreamingDecoder | None:
        """On rank 0 the decoder, with whose work the other ranks help in the background."""
        if self._gang.size == 1:
            return StreamingDecoder(vae)
        if self._worker is not None:
            self._worker.join()
        axis = self._gang.host_axis()
        if self._gang.leads:
            return StripedDecoder(vae, axis, self._gang)
        self._worker = StripeWorker(vae, axis, self._gang)
        return None


class _Run:
    """The loop over one shot's blocks, with what surrounds it."""

    def __init__(
        self,
        shot: ShotConfig,
        files: ShotFolder,
        rollout: Rollout,
        decoder: StreamingDecoder,
        gang: Gang,
        clock: StageClock,
    ) -> None:
        self._gang, self._clock = gang, clock
        self._shot, self._files, self._rollout, self._decoder = shot, files, rollout, decoder
        self._frames_done = 0

    def until(self, stop: Callable[[], bool], progress: Callable[[BlockProgress], None]) -> bool:
        """The main loop; returns whether the shot is finished."""
        rollout, files, shot = self._rollout, self._files, self._shot
        if files.num_done:
            latents_shown = files.segments.first_block * shot.model.block_frames
            progress(self._report(files.num_done, min(shot.num_frames, shot.frames_of_latents(latents_shown)), 0.0))
        with MetricsLog(files.path / METRICS_NAME, files.num_done) as metrics, self._emitter() as emitter:
            keep = shot.cache.keep
            retention = Retention(keep, rollout.timeline, rollout.cache, self._gang, lambda: emitter.num_kept)

            def settle() -> None:
                rollout.cache.flush()
                emitter.settle()

            rollout.rest = resting(self._gang, rollout.cache.flush, emitter.rest)
            while rollout.next_block < shot.num_blocks and not self._gang.any(stop()):
                started, block = time.perf_counter(), rollout.next_block
                clean = rollout.step()
                if block >= 0:
                    emitter.put(clean)
                    report = self._report(block + 1, emitter.num_frames, time.perf_counter() - started)
                    metrics.append(self._metric(report))
                    progress(report)
                files.segments.journal()
                retention(settle)
            if rollout.next_block == shot.num_blocks:
                emitter.finish(stop, files.segments.journal)
            else:
                emitter.stop()
            rollout.cache.flush()
            files.segments.journal()
            retention(rollout.cache.flush)
        return files.finished

    def _emitter(self) -> Emitter:
        first, done = self._files.segments.first_block, self._files.num_done
        start = Start(first_block=first, num_kept=done, warm_up=self._before(first))
        return Emitter(self._shot, self._decoder, self._files.latents, self._files.segments, start, self._clock)

    def _before(self, first: int) -> Iterator[Tensor]:
        """The latents on which the decoder's state before block ``first`` depends, oldest first."""
        blocks = min(first, -(-receptive_latents(self._decoder.vae) // self._shot.model.block_frames))
        if blocks == first:
            yield from self._rollout.prefix.latents
        for block in range(first - blocks, first):
            yield self._files.latents.read(block, block + 1)

    def _report(self, blocks_done: int, frames_done: int, seconds: float) -> BlockProgress:
        memory = self._rollout.cache.memory()
        return BlockProgress(
            block=blocks_done,
            num_blocks=self._shot.num_blocks,
            frames_done=frames_done,
            num_frames=self._shot.num_frames,
            seconds_block=seconds,
            device_cache_bytes=sum(size for name, size in memory.items() if name.startswith("device")),
        )

    def _metric(self, report: BlockProgress) -> dict[str, Any]:
        return {
            "time": time.time(),
            "block": report.block,
            "seconds": round(report.seconds_block, 4),
            "frames": report.frames_done,
            "num_ranks": self._gang.size,
            "stages_s": {stage: round(seconds, 4) for stage, seconds in self._clock.seconds().items()},
            "memory": self._memory(),
            "tiers": {name: dataclasses.asdict(tier) for name, tier in self._rollout.cache.tiers().items()},
            "retrieved": self._rollout.retrieved,
            "durable_blocks": self._rollout.cache.durable_blocks,
            **dataclasses.asdict(self._rollout.cache.stats()),
        }

    def _memory(self) -> dict[str, int]:
        """Bytes by name; on CUDA with what the allocator holds beside: activations, above all."""
        named = {
            **self._rollout.memory(),
            "vae": self._decoder.weight_bytes,
            "decoder_state": self._decoder.state_bytes,
        }
        if self._rollout.device.type == "cuda":
            on_device = sum(size for name, size in named.items() if not name.startswith("host"))
            named["activations"] = max(0, torch.cuda.max_memory_reserved(self._rollout.device) - on_device)
        return named


def encode_beats(shot: ShotConfig, folder: Path, model: CausalWan, gang: Gang) -> Prompts:
    """The prompts of each block; the text encoder, on rank 0, is gone from memory when this returns."""

    def encode() -> dict[str, Tensor]:
        encoder = TextEncoder(shot.model.path, text_len=shot.model.text_len, cache_dir=folder.parent / PROMPTS_NAME)
        return encoder.encode_all(beat.prompt for beat in shot.beats)

    embeds = gang.lead(encode)
    return make_prompts(shot, model, [embeds[beat.prompt] for beat in shot.beats])


def read_start(shot: ShotConfig, folder: Path, decoder: StreamingDecoder | None) -> Prefix:
    """What the shot starts from; runs on rank 0, which has the VAE.

    Raises:
        ConfigError, StorageError: it is not there, too short or damaged.
    """
    assert decoder is not None, "rank 0 has the VAE"
    encoder = StreamingEncoder(decoder.vae)
    if shot.image is not None:
        return Prefix(fixed=picture_latents(shot, encoder).cpu())
    if shot.clip is not None:
        return Prefix(latents=tuple(latents.cpu() for latents in clip_latents(shot, encoder)))
    if shot.guide is not None:
        return Prefix(guide=write_guide(shot, folder, encoder))
    return read_prefix(shot, folder, decoder)


def read_prefix(shot: ShotConfig, folder: Path, decoder: StreamingDecoder) -> Prefix:
    """The last blocks, or the last frame, of the shot that this one starts from.

    Raises:
        StorageError: that shot is not there or not finished, or its latents are damaged.
    """
    if shot.after is None:
        return Prefix()
    before = folder.parent / shot.after
    log = shot_latents(before, shot.after, shot.name)
    blocks = range(len(log) - shot.after_blocks, len(log))
    try:
        if not blocks:
            return Prefix(fixed=last_frame_latents(shot, log, decoder).cpu())
        return Prefix(latents=tuple(log.read(block, block + 1) for block in blocks))
    except StorageError as error:
        mend = f"delete that file and the video of shot {shot.after!r} and run again to go on from its block"
        raise StorageError(f"{error.args[0]}; {mend}", block=error.block, path=error.path) from error
