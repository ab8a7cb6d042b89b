"""From clean latents to the latent log and to segments of video, beside the rollout, which goes on with the next block.

Segments are cut every ``segment_blocks`` blocks, whatever happens in between, so that a resumed shot has the bytes of
an undisturbed one. A worker thread owns the decoder and, on CUDA, a stream of its own; a small queue holds the rollout
back when decoding is slower::

    the latent log --[blocks that no whole segment shows]--+
                                                           v
    rollout --put--> [queue] --> latent log --> decode --> segment --named--> Segments
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from longtake.engine.config import ShotConfig
from longtake.engine.latents import LatentLog
from longtake.engine.segments import Segments, segment_blocks
from longtake.engine.timing import NO_TIMER, StageTimer
from longtake.engine.vae import StreamingDecoder
from longtake.engine.video import SegmentWriter

_QUEUE_BLOCKS = 2
_POLL_S = 0.1

_Item = tuple[Tensor, "torch.cuda.Event | None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where an emitter begins.

    Args:
        first_block: first of a segment; its frames are the first to be decoded.
        num_kept: blocks that are in the latent log already; those from ``first_block`` on are decoded from there.
        warm_up: latents [C, F, Y, X] that bring the decoder to its state before ``first_block``; read by the worker.
    """

    first_block: int
    num_kept: int
    warm_up: Iterable[Tensor] = ()


class Emitter:
    """Keeps, decodes and writes blocks in the order in which they are put; used by one producer thread.

    As a context manager it stops at once when the body raised, and is `finish`ed or `stop`ped by the body otherwise.

    Args:
        shot: what is rendered.
        decoder: fresh; the worker's alone from now on.
        latents: where blocks are kept.
        segments: where they are written.
        start: where to begin.
        stages: told of the time that decoding and writing take, for metrics.
    """

    def __init__(
        self,
        shot: ShotConfig,
        decoder: StreamingDecoder,
        latents: LatentLog,
        segments: Segments,
        start: Start,
        stages: StageTimer = NO_TIMER,
    ) -> None:
        self._stages = stages
        self._shot, self._decoder, self._latents, self._segments = shot, decoder, latents, segments
        self._warm_up, self._block, self._num_kept = start.warm_up, start.first_block, start.num_kept
        self._size = segment_blocks(shot)
        self.num_frames = min(shot.num_frames, shot.frames_of_latents(start.first_block * shot.model.block_frames))
        self._num_put = start.num_kept
        self._segment_frames = 0
        self._writer: SegmentWriter | None = None
        self._queue: queue.Queue[_Item | None] = queue.Queue(_QUEUE_BLOCKS)
        self._error: BaseException | None = None
        self._stopping = threading.Event()
        self._cuda = decoder.vae.device.type == "cuda"
        self._loaded = self._mark()
        self._thread = threading.Thread(target=self._work, name=f"emitter-{shot.name}", daemon=True)
        self._thread.start()

    def put(self, latents_CFYX: Tensor) -> None:
        """Queue the next block's clean latents; waits while the queue is full.

        Raises:
            BaseException: whatever stopped the worker.
        """
        item = (latents_CFYX, self._mark())
        self._num_put += 1
        while True:
            self._check()
            try:
                return self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue

    @property
    def num_kept(self) -> int:
        """Blocks whose latents are on the disk."""
        return self._num_kept

    def settle(self) -> None:
        """Wait until the latents of all that was put are on the disk.

        Raises:
            BaseException: whatever stopped the worker.
        """
        self._await(lambda: self._num_kept)

    def rest(self) -> None:
        """Wait until all that was put is decoded: the device is the producer's alone.

        Raises:
            BaseException: whatever stopped the worker.
        """
        self._await(lambda: self._block)

    def _await(self, num_done: Callable[[], int]) -> None:
        while num_done() < self._num_put and self._thread.is_alive():
            self._check()
            self._thread.join(_POLL_S)
        self._check()

    def finish(self, stop: Callable[[], bool], meanwhile: Callable[[], None]) -> bool:
        """Wait until all that was put is decoded and written, and end the worker.

        Args:
            stop: asked now and then; if it says so, what is not decoded yet stays so, as with `stop`.
            meanwhile: called now and then.

        Returns:
            Whether all of it was emitted.

        Raises:
            BaseException: whatever stopped the worker.
        """
        closed = False
        while self._thread.is_alive() and not stop():
            if not closed:
                try:
                    self._queue.put(None, timeout=_POLL_S)
                    closed = True
                except queue.Full:
                    continue
            self._thread.join(_POLL_S)
            meanwhile()
        emitted = not self._thread.is_alive()
        self.stop()
        return emitted

    def stop(self) -> None:
        """Keep the latents that were put, leave an unfinished segment unnamed, and end the worker.

        Raises:
            BaseException: whatever stopped the worker.
        """
        self._end()
        self._check()

    def __enter__(self) -> Emitter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._stopping.set()
        interrupt: BaseException | None = None
        while self._thread.is_alive():
            try:
                if not self._queue.full():
                    self._queue.put(None)  # more than one does no harm
                self._thread.join(_POLL_S)
            except BaseException as signalled:  # no thread may outlive the folder's lock
                interrupt = signalled
        if interrupt is not None:
            raise interrupt

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _mark(self) -> torch.cuda.Event | None:
        """An event after all that the producer has issued."""
        if not self._cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    # -- the worker's thread

    def _work(self) -> None:
        stream = torch.cuda.Stream(self._decoder.vae.device) if self._cuda else None
        try:
            with torch.cuda.stream(stream):
                if stream is not None and self._loaded is not None:
                    stream.wait_event(self._loaded)
                self._catch_up()
                while (item := self._queue.get()) is not None:
                    latents_CFYX, ready = item
                    if stream is not None and ready is not None:
                        stream.wait_event(ready)
                        latents_CFYX.record_stream(stream)
                    self._emit(latents_CFYX)
        except BaseException as error:  # the producer raises it
            self._error = error
        finally:
            if self._writer is not None:
                self._writer.abort()

    def _catch_up(self) -> None:
        for latents_CFYX in self._warm_up:
            if self._stopping.is_set():
                return
            self._decoder.warm_up(latents_CFYX)
        for block in range(self._block, self._num_kept):
            if self._stopping.is_set():
                return
            self._decode(self._latents.read(block, block + 1))

    def _emit(self, latents_CFYX: Tensor) -> None:
        """A new block: kept first, so that nothing is lost when decoding is cut short."""
        self._latents.write(self._num_kept, latents_CFYX)
        self._num_kept += 1
        if not self._stopping.is_set():
            self._decode(latents_CFYX)

    def _decode(self, latents_CFYX: Tensor) -> None:
        shot = self._shot
        if self._writer is None:
            self._writer = SegmentWriter(
                self._segments.path(self._block // self._size),
                fps=shot.fps,
                size=(shot.height, shot.width),
                codec=shot.video_codec,
            )
            self._segment_frames = 0
        with self._stages("decode"):
            frames = self._decoder.decode(latents_CFYX)[: shot.num_frames - self.num_frames].cpu()
        with self._stages("write"):
            self._writer.write(frames)
        self.num_frames += len(frames)
        self._segment_frames += len(frames)
        self._block += 1
        if self._block % self._size == 0 or self._block == shot.num_blocks:
            path = self._writer.close()
            self._writer = None
            self._segments.written(path, self._block, self._segment_frames)
