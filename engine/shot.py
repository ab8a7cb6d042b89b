"""One shot from its configuration to segments of video, from the start or from wherever an earlier run left it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from longtake.engine.config import ModelSpec, ShotConfig, fingerprint
from longtake.engine.emitter import Emitted, Emitter, segment_blocks
from longtake.engine.latents import LatentLog
from longtake.engine.model import CausalWan, TextContext
from longtake.engine.rollout import Prefix, Rollout, kv_shape, open_cache
from longtake.engine.text import TextEncoder
from longtake.engine.vae import StreamingDecoder, load_vae, receptive_latents
from longtake.engine.video_codec import video_codec
from longtake.engine.weights import load_transformer
from longtake.kernels.errors import ConfigError, StorageError
from longtake.offload.run import RunDirectory

LATENTS_NAME = "latents.zarr"
SEGMENTS_NAME = "segments"
METRICS_NAME = "metrics.jsonl"
PROMPTS_NAME = "prompts"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockProgress:
    """Where a shot stands after a block; counts include it. ``frames_done`` are those decoded, which may lag."""

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
    """Renders shots, keeping the last model loaded; what ``jobs`` calls. Not thread-safe."""

    def __init__(self) -> None:
        self._key: tuple[Path, str] | None = None
        self._model: CausalWan | None = None
        self._decoder: StreamingDecoder | None = None

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
            progress: told after each block.

        Raises:
            ConfigError, CapacityError, StorageError: see the message.
        """
        device = parse_device(device_name)
        model, decoder = self._load(shot.model, device)
        contexts = encode_beats(shot, folder, model, device)
        prefix = read_prefix(shot, folder)
        folder.mkdir(parents=True, exist_ok=True)
        latents = LatentLog(folder / LATENTS_NAME, shot.num_blocks, shot.latent_shape)
        with contextlib.ExitStack() as held:
            run = open_run(shot, folder, len(prefix.latents), latents)
            held.callback(run.close)
            cache = open_cache(shot, device, len(prefix.latents), run)
            held.callback(cache.close)
            rollout = Rollout(shot, model, contexts, cache, prefix)
            result = _Run(shot, folder, rollout, decoder, latents, prefix).until(stop, progress)
            cache.flush()
        return result

    def _load(self, spec: ModelSpec, device: torch.device) -> tuple[CausalWan, StreamingDecoder]:
        key = (spec.path, str(device))
        if self._key != key or self._model is None or self._decoder is None:
            self._model = self._decoder = None
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            self._model = load_transformer(spec, device, dtype)
            if device.type == "cuda":
                self._model.compile_layers()
            self._decoder = StreamingDecoder(load_vae(spec.path / "vae", dtype=dtype, device=device))
            self._key = key
        self._decoder.reset()
        return self._model, self._decoder


class _Run:
    """The loop over one shot's blocks, with what surrounds it."""

    def __init__(
        self,
        shot: ShotConfig,
        folder: Path,
        rollout: Rollout,
        decoder: StreamingDecoder,
        latents: LatentLog,
        prefix: Prefix,
    ) -> None:
        self._shot, self._folder, self._rollout, self._latents = shot, folder, rollout, latents
        self._segments = folder / SEGMENTS_NAME
        self._segments.mkdir(parents=True, exist_ok=True)
        self._frames_done = 0
        done = max(0, rollout.next_block)
        size = segment_blocks(shot)
        first = done if done == shot.num_blocks else done - done % size
        self._drop_segments_from(first // size)
        self._warm_up(decoder, prefix, first)
        self._emitter = Emitter(
            shot,
            decoder,
            latents,
            self._segments,
            first_block=first,
            keep_from=done,
            on_emitted=self._on_emitted,
        )
        for block in range(first, done):
            self._emitter.put(latents.read(block, block + 1))

    def until(self, stop: Callable[[], bool], progress: Callable[[BlockProgress], None]) -> ShotResult:
        """The main loop."""
        rollout, shot = self._rollout, self._shot
        try:
            with (self._folder / METRICS_NAME).open("a") as metrics:
                while rollout.next_block < shot.num_blocks and not stop():
                    started, block = time.perf_counter(), rollout.next_block
                    clean = rollout.step()
                    if block >= 0:
                        self._emitter.put(clean)
                        report = self._report(block + 1, time.perf_counter() - started)
                        progress(report)
                        metrics.write(self._metric(report) + "\n")
                        metrics.flush()
        finally:
            self._emitter.close()
        finished = rollout.next_block == shot.num_blocks
        return ShotResult(finished=finished, segments=self._complete_segments())

    def _warm_up(self, decoder: StreamingDecoder, prefix: Prefix, first: int) -> None:
        """Bring the decoder to the state it had before block ``first``, from the latents before it."""
        frames = self._shot.model.block_frames
        blocks = min(first, -(-receptive_latents(decoder.vae) // frames))
        if blocks == first:
            for latents in prefix.latents:
                decoder.warm_up(latents)
        if blocks:
            decoder.warm_up(self._latents.read(first - blocks, first))

    def _complete_segments(self) -> tuple[Path, ...]:
        return tuple(sorted(self._segments.glob(f"*{video_codec(self._shot.video_codec).suffix}")))

    def _drop_segments_from(self, index: int) -> None:
        for path in self._complete_segments():
            if int(path.stem) >= index:
                path.unlink()

    def _on_emitted(self, emitted: Emitted) -> None:
        self._frames_done = emitted.num_frames

    def _report(self, blocks_done: int, seconds: float) -> BlockProgress:
        memory = self._rollout.cache.memory()
        return BlockProgress(
            block=blocks_done,
            num_blocks=self._shot.num_blocks,
            frames_done=self._frames_done,
            num_frames=self._shot.num_frames,
            seconds_block=seconds,
            device_cache_bytes=sum(size for name, size in memory.items() if name.startswith("device")),
        )

    def _metric(self, report: BlockProgress) -> str:
        record = {
            "time": time.time(),
            "block": report.block,
            "seconds": round(report.seconds_block, 4),
            "frames": report.frames_done,
            "memory": self._rollout.memory(),
            "durable_blocks": self._rollout.cache.durable_blocks,
            **dataclasses.asdict(self._rollout.cache.stats()),
        }
        return json.dumps(record)


def open_run(shot: ShotConfig, folder: Path, num_prefix: int, latents: LatentLog) -> RunDirectory:
    """The shot's durable history; what lies beyond the last block whose latents are there too is cut off.

    Raises:
        LockedError, ConfigError, StorageError: another process renders it, it is of another shot, it is damaged.
    """
    known = num_prefix + latents.num_written()
    return RunDirectory(
        folder,
        shape=kv_shape(shot),
        config_hash=fingerprint(shot),
        agree=lambda num_blocks: min(num_blocks, known),
        num_blocks=num_prefix + shot.num_blocks,
    )


def encode_beats(shot: ShotConfig, folder: Path, model: CausalWan, device: torch.device) -> Sequence[TextContext]:
    """Cross-attention context of each beat; the text encoder is gone from memory when this returns."""
    encoder = TextEncoder(shot.model.path, text_len=shot.model.text_len, cache_dir=folder.parent / PROMPTS_NAME)
    embeds = encoder.encode_all(beat.prompt for beat in shot.beats)
    with torch.inference_mode():
        contexts = {prompt: model.text_context(embed[None].to(device)) for prompt, embed in embeds.items()}
    return [contexts[beat.prompt] for beat in shot.beats]


def read_prefix(shot: ShotConfig, folder: Path) -> Prefix:
    """The last blocks of the shot that this one starts from.

    Raises:
        StorageError: that shot is not there or not finished.
    """
    if shot.after is None:
        return Prefix()
    path = folder.parent / shot.after / LATENTS_NAME
    if not (path / "zarr.json").exists():
        raise StorageError(f"shot {shot.name!r} starts from {shot.after!r}, which is not rendered: no {path}")
    log = LatentLog.existing(path)
    blocks = range(len(log) - shot.after_blocks, len(log))
    return Prefix(latents=tuple(log.read(block, block + 1) for block in blocks))
