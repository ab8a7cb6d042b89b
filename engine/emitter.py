"""From clean latents to the latent log and to segments of video, beside the rollout, which goes on with the next block.

Segments are cut every ``segment_blocks`` blocks, whatever happens in between, so that a resumed shot has the bytes of
an undisturbed one. A worker thread owns the decoder and, on CUDA, a stream of its own; a small queue holds the rollout
back when decoding is slower.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longtake.engine.config import ShotConfig
from longtake.engine.latents import LatentLog
from longtake.engine.vae import StreamingDecoder
from longtake.engine.video import SegmentWriter
from longtake.engine.video_codec import video_codec

SEGMENT_S = 10.0
_QUEUE_BLOCKS = 2


def segment_blocks(shot: ShotConfig) -> int:
    """Blocks of one segment: as many as make about ``SEGMENT_S`` seconds."""
    frames = shot.model.block_frames * shot.model.temporal_stride
    return max(1, round(SEGMENT_S * shot.fps / frames))


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitted:
    """What the worker has finished: frames decoded so far, and the segment that became complete with them, if any."""

    num_frames: int
    segment: Path | None = None


class Emitter:
    """Decodes and writes blocks in the order in which they are put; used by one producer thread.

    Args:
        shot: what is rendered.
        decoder: warmed up to the block before ``first_block``; the worker's alone from now on.
        latents: where blocks from ``keep_from`` on are kept before they are decoded.
        folder: of the segments.
        first_block: a multiple of :func:`segment_blocks`.
        keep_from: blocks before it are in ``latents`` already.
        on_emitted: called in the worker's thread after each block.
    """

    def __init__(
        self,
        shot: ShotConfig,
        decoder: StreamingDecoder,
        latents: LatentLog,
        folder: Path,
        first_block: int,
        keep_from: int,
        on_emitted: Callable[[Emitted], None],
    ) -> None:
        self._shot, self._decoder, self._folder, self._on_emitted = shot, decoder, folder, on_emitted
        self._latents, self._keep_from = latents, keep_from
        self._block = first_block
        self._size = segment_blocks(shot)
        self._num_frames = shot.frames_of_latents(first_block * shot.model.block_frames)
        self._writer: SegmentWriter | None = None
        self._queue: queue.Queue[tuple[Tensor, torch.cuda.Event | None] | None] = queue.Queue(_QUEUE_BLOCKS)
        self._error: BaseException | None = None
        self._cuda = decoder.vae.device.type == "cuda"
        self._thread = threading.Thread(target=self._work, name=f"emitter-{shot.name}", daemon=True)
        self._thread.start()

    def put(self, latents_CFYX: Tensor) -> None:
        """Queue the next block's clean latents; waits while the queue is full.

        Raises:
            BaseException: whatever stopped the worker.
        """
        event = None
        if self._cuda:
            event = torch.cuda.Event()
            event.record()
        self._put((latents_CFYX, event))

    def close(self) -> None:
        """Finish what was put, leave an unfinished segment unnamed, and end the worker; raises what stopped it."""
        self._put(None)
        self._thread.join()
        self._check()

    def _put(self, item: tuple[Tensor, torch.cuda.Event | None] | None) -> None:
        while True:
            self._check()
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            stream = torch.cuda.Stream(self._decoder.vae.device) if self._cuda else None
            with torch.cuda.stream(stream):
                while (item := self._queue.get()) is not None:
                    latents, event = item
                    if stream is not None and event is not None:
                        stream.wait_event(event)
                        latents.record_stream(stream)
                    self._emit(latents)
            if self._writer is not None:
                self._writer.abort()
        except BaseException as error:
            self._error = error
            if self._writer is not None:
                self._writer.abort()

    def _emit(self, latents_CFYX: Tensor) -> None:
        shot, block = self._shot, self._block
        if block >= self._keep_from:
            self._latents.write(block, latents_CFYX)
        if self._writer is None:
            path = self._folder / f"{block // self._size:05d}{video_codec(shot.video_codec).suffix}"
            self._writer = SegmentWriter(path, fps=shot.fps, size=(shot.height, shot.width), codec=shot.video_codec)
        frames = self._decoder.decode(latents_CFYX)[: shot.num_frames - self._num_frames]
        self._writer.write(frames.cpu())
        self._num_frames += len(frames)
        self._block += 1
        segment = None
        if self._block % self._size == 0 or self._block == shot.num_blocks:
            segment = self._writer.close()
            self._writer = None
        self._on_emitted(Emitted(num_frames=self._num_frames, segment=segment))
