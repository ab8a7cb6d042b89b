"""Video files: segments that are whole or not there, joined without re-encoding, read back and looked at.

A film is written as segments, each a file of its own that starts with a key frame and refers to nothing outside it
(closed GOP). The same frames give the same bytes, on any run of the same build of PyAV: encoders run with a fixed
number of threads and files carry no dates and no names of tools. Colours are BT.709, limited range, and tagged so.

    write: SegmentWriter -> 00000.mp4.partial -> (close, check, fsync, rename) -> 00000.mp4
    join:  00000.mp4 + 00001.mp4 + ... -> film.mp4        packets copied, timestamps counted anew in frames

Shapes: N frames, Y and X pixels high and wide. Sizes are (height, width), as in a tensor's shape.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.codec.context import Flags
from av.container import OutputContainer
from av.packet import Packet
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from longtake.engine.footage import (
    Frames,
    Inspection,
    VideoInfo,
    frame_index,
    inspect_video,
    open_video,
    probe,
    read_frames,
    storage_errors,
)
from longtake.engine.video_codec import CODECS, EXACT_SCALING, check_geometry, parse_fps, video_codec
from longtake.kernels.errors import ConfigError, StorageError
from longtake.offload.files import PARTIAL_SUFFIX, FileOps, fsync_dir

__all__ = ["CODECS", "SegmentWriter", "VideoInfo", "join", "parse_fps", "probe", "read_frames"]

_BT709 = 1
_KEYFRAME_S = 2
_BITEXACT = {"fflags": "+bitexact"}


class SegmentWriter:
    """Encodes frames into one file, which gets its name only when it is whole and on the disk.

    For one thread at a time; `write` blocks while it encodes. As a context manager it closes, or aborts on an error.

    Args:
        path: of the segment; its suffix is that of the codec. A leftover of a killed run is overwritten.
        fps: see `parse_fps`.
        size: height and width in pixels.
        codec: a name of `CODECS`.

    Raises:
        ConfigError: the codec cannot store this size, or does not go with the suffix.
        StorageError: the file cannot be made.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: Fraction | int | float | str,
        size: tuple[int, int],
        codec: str = "h264",
    ) -> None:
        self.path = Path(path)
        self.fps = parse_fps(fps)
        self.size = size
        self._codec = video_codec(codec)
        self._partial = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        self._num_frames = 0
        self._num_packets = 0
        self._reformatter = VideoReformatter()
        check_geometry(codec, self.path, size)
        with storage_errors(self._partial, "cannot be made"):
            self._container: OutputContainer | None = av.open(
                str(self._partial), "w", format=self._codec.container, container_options=_BITEXACT
            )
            self._stream = self._add_stream(self._container)
            self._container.start_encoding()

    @property
    def num_frames(self) -> int:
        """Frames written so far."""
        return self._num_frames

    def write(self, frames_NYX3: Tensor | Frames) -> None:
        """Encode the next frames.

        Args:
            frames_NYX3: uint8 RGB, a tensor on any device or an array; N may be 0.

        Raises:
            ConfigError: another shape or type than the segment's.
            StorageError: the disk refuses.
        """
        frames = frames_NYX3.cpu().numpy() if isinstance(frames_NYX3, Tensor) else frames_NYX3
        if frames.dtype != np.uint8 or frames.shape[1:] != (*self.size, 3):
            raise ConfigError(
                f"frames must be uint8 [N, {self.size[0]}, {self.size[1]}, 3], not {frames.dtype} {list(frames.shape)}",
                path=self.path,
            )
        container = self._open_container()
        with storage_errors(self._partial, "cannot be written"):
            for frame_YX3 in frames:
                frame = self._convert(np.ascontiguousarray(frame_YX3))
                frame.pts, frame.time_base = self._num_frames, 1 / self.fps
                self._num_frames += 1
                self._mux(container, self._stream.encode(frame))

    def close(self) -> Path:
        """Finish the file, check that every frame is in it, force it to the disk, and name it.

        Returns: its path.

        Raises:
            ConfigError: no frame was written.
            StorageError: the disk refuses, or the file does not hold what was written. Then the file is not named.
        """
        container = self._open_container()
        if not self._num_frames:
            self.abort()
            raise ConfigError("a segment needs at least one frame: write some, or abort it", path=self.path)
        try:
            with storage_errors(self._partial, "cannot be finished"):
                self._mux(container, self._stream.encode(None))
                container.close()
            self._container = None
            _publish(self._partial, self.path, self._num_frames)
        except BaseException:
            self.abort()
            raise
        return self.path

    def abort(self) -> None:
        """Drop the file; nothing of it stays. May be called at any time, also after `close`, when it does nothing."""
        container, self._container = self._container, None
        if container is not None:
            with contextlib.suppress(av.error.FFmpegError, OSError):  # it is thrown away
                container.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._container is not None:
            self.close()

    def _open_container(self) -> OutputContainer:
        if self._container is None:
            raise ConfigError("the segment is closed: open another writer", path=self.path)
        return self._container

    def _add_stream(self, container: OutputContainer) -> VideoStream:
        stream = container.add_stream(self._codec.encoder, rate=self.fps, options=dict(self._codec.options))
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = self.size
        stream.pix_fmt = self._codec.pixels
        context = stream.codec_context
        context.time_base = 1 / self.fps
        context.thread_count = 1  # other numbers give other bytes
        context.gop_size = max(1, round(_KEYFRAME_S * self.fps))
        context.flags |= Flags.bitexact | Flags.closed_gop
        if self._codec.pixels.startswith("yuv"):
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = ColorRange.MPEG
        if self._codec.tag is not None:
            context.codec_tag = self._codec.tag
        return stream

    def _convert(self, frame_YX3: Frames) -> av.VideoFrame:
        frame = av.VideoFrame.from_ndarray(frame_YX3, format="rgb24")
        if not self._codec.pixels.startswith("yuv"):
            return self._reformatter.reformat(frame, format=self._codec.pixels, threads=1)
        return self._reformatter.reformat(
            frame,
            format=self._codec.pixels,
            src_color_range=ColorRange.JPEG,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=EXACT_SCALING,
            threads=1,
        )

    def _mux(self, container: OutputContainer, packets: Sequence[Packet[VideoStream]]) -> None:
        # Encoders disagree on decoding times of very short clips, x265 with the format's own rules: count them here.
        for packet in packets:
            packet.dts = self._num_packets - self._codec.reorder_frames
            packet.duration = 1
            packet.time_base = 1 / self.fps
            self._num_packets += 1
            container.mux(packet)


def join(segments: Sequence[str | Path], out: str | Path) -> VideoInfo:
    """Copy the packets of segments into one file, one after another; nothing is decoded and no bit of a frame changes.

    Timestamps are counted anew in frames, so that they run on evenly whatever the segments' lengths. The result is
    named only when whole and on the disk; moov goes first in mp4, so that it plays while it loads.

    Args:
        segments: files of one codec, size and rate, in order; of one shot or of several.
        out: the film; its suffix is that of the segments.

    Raises:
        ConfigError: no segments, or they do not fit together.
        StorageError: one is missing or cut short, or the disk refuses.
    """
    out = Path(out)
    if not segments:
        raise ConfigError("nothing to join: no segments", path=out)
    parts = [inspect_video(Path(path)) for path in segments]
    for part in parts[1:]:
        parts[0].check_fits(part)
    if out.suffix != parts[0].path.suffix:
        raise ConfigError(f"{parts[0].path.suffix} segments join to a {parts[0].path.suffix} file", path=out)
    partial = out.with_name(out.name + PARTIAL_SUFFIX)
    num_frames = sum(part.info.frames for part in parts)
    try:
        with storage_errors(partial, "cannot be written"):
            _copy_packets(parts, partial)
        return _publish(partial, out, num_frames)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _copy_packets(parts: Sequence[Inspection], partial: Path) -> None:
    fps, delay = parts[0].info.fps, max(part.reorder_frames for part in parts)
    codec = video_codec(parts[0].info.codec)
    options = {**_BITEXACT, **({"movflags": "+faststart"} if codec.container in ("mp4", "mov") else {})}
    with av.open(str(partial), "w", format=codec.container, container_options=options) as output:
        stream: VideoStream | None = None
        num_packets = num_frames = 0
        for part in parts:
            with open_video(part.path) as (source, source_stream):
                if stream is None:
                    stream = output.add_stream_from_template(source_stream)
                    stream.time_base, stream.rate = 1 / fps, fps
                    if codec.tag is not None:
                        stream.codec_context.codec_tag = codec.tag
                for packet in source.demux(source_stream):
                    if not packet.size:
                        continue
                    index = num_frames + frame_index(packet, fps, part.path)
                    packet.pts, packet.dts, packet.duration = index, num_packets - delay, 1
                    packet.time_base = 1 / fps
                    packet.stream = stream
                    output.mux(packet)
                    num_packets += 1
            num_frames += part.info.frames


def _publish(partial: Path, path: Path, num_frames: int) -> VideoInfo:
    info = inspect_video(partial).info
    if info.frames != num_frames:
        raise StorageError(f"{num_frames} frames were written, {info.frames} are in the file", path=partial)
    with storage_errors(path, "cannot be named"):
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync_dir(FileOps(), path.parent)
    return info
