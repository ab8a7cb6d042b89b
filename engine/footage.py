"""Video files read: counted and decoded.

Shapes: N frames, Y and X pixels high and wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream

from longtake.engine.video_codec import EXACT_SCALING, parse_fps
from longtake.kernels.errors import ConfigError, StorageError

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What a video file holds: every frame counted, not what its header says."""

    frames: int
    fps: Fraction
    height: int
    width: int
    codec: str

    @property
    def duration_s(self) -> float:
        """Seconds it plays."""
        return float(self.frames / self.fps)


def probe(path: str | Path) -> VideoInfo:
    """Count a video file's frames by reading every packet, without decoding.

    Raises:
        StorageError: it is missing, cut short, or no video.
    """
    return inspect_video(Path(path)).info


def count_frames(path: str | Path) -> int:
    """Count the frames of any video or picture by its packets, no matter who wrote it and when each is shown.

    Raises:
        StorageError: it is missing, or no video.
    """
    with open_video(Path(path)) as (container, stream):
        return sum(packet.size > 0 for packet in container.demux(stream))


def read_frames(path: str | Path) -> Iterator[Frames]:
    """Decode a video file frame by frame: uint8 RGB [Y, X, 3].

    Damage that the decoder notices is an error instead of a grey frame. No video codec notices every flipped bit: what
    must be known to be intact needs a checksum of the file.

    Raises:
        StorageError: it is missing, cut short, damaged, or no video.
    """
    path = Path(path)
    reformatter = VideoReformatter()
    num_frames = 0
    with open_video(path) as (container, stream):
        stream.codec_context.options = {"err_detect": "explode"}
        for frame in container.decode(stream):
            rgb = reformatter.reformat(
                frame, format="rgb24", dst_color_range=ColorRange.JPEG, interpolation=EXACT_SCALING, threads=1
            )
            yield np.asarray(rgb.to_ndarray(), dtype=np.uint8)
            num_frames += 1
    if num_frames != (expected := probe(path).frames):
        raise StorageError(f"damaged: only {num_frames} of {expected} frames can be decoded", path=path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A whole file, and what must agree for its packets to go into one stream with another's.

    Args:
        path: of the file.
        info: what it holds.
        reorder_frames: how far decoding order runs ahead of display order in it.
        pixels: stored pixel format.
        parameters: the decoder's parameters: what the encoder was set to.
    """

    path: Path
    info: VideoInfo
    reorder_frames: int
    pixels: str | None
    parameters: bytes | None

    def check_fits(self, other: Inspection) -> None:
        """Raise a ConfigError that names the first difference, if another's packets do not fit behind these."""
        ours, theirs = self.info, other.info
        for name, mine, its in (
            ("codec", ours.codec, theirs.codec),
            ("size", f"{ours.width}x{ours.height}", f"{theirs.width}x{theirs.height}"),
            ("fps", ours.fps, theirs.fps),
            ("pixel format", self.pixels, other.pixels),
        ):
            if mine != its:
                raise ConfigError(
                    f"{name} differs: {self.path.name} has {mine}, this one {its}: render both alike", path=other.path
                )
        if self.parameters != other.parameters:
            raise ConfigError(
                f"encoder settings differ from those of {self.path.name}: render both with the same codec and version "
                "of longtake",
                path=other.path,
            )


def inspect_video(path: Path) -> Inspection:
    """Read every packet of a file; as `probe`, with what joining needs."""
    with open_video(path) as (container, stream):
        if stream.average_rate is None or stream.time_base is None:
            raise StorageError("it has no frame rate: longtake did not write it", path=path)
        fps = parse_fps(stream.average_rate)
        indices: list[int] = []
        for packet in container.demux(stream):
            if packet.size:
                indices.append(frame_index(packet, fps, path))
        declared = stream.frames or (round(container.duration * fps / av.time_base) if container.duration else 0)
        if not indices or len(indices) != declared or sorted(indices) != list(range(len(indices))):
            raise StorageError(f"cut short: {len(indices)} frames of {declared} are there; render it again", path=path)
        context = stream.codec_context
        return Inspection(
            path=path,
            info=VideoInfo(
                frames=len(indices),
                fps=fps,
                height=context.height,
                width=context.width,
                codec=_codec_name(context.name),
            ),
            reorder_frames=max(order - index for order, index in enumerate(indices)),
            pixels=context.pix_fmt,
            parameters=context.extradata,
        )


def frame_index(packet: Packet[VideoStream], fps: Fraction, path: Path) -> int:
    """Which frame of the file, counted from 0 in display order, a packet holds."""
    if packet.is_corrupt or packet.pts is None:
        raise StorageError("a packet is cut short; render it again", path=path)
    return round(packet.pts * packet.time_base * fps)


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and its video stream; whatever FFmpeg finds wrong with it becomes a StorageError that names it."""
    if not path.is_file():
        raise StorageError("there is no such video", path=path)
    with storage_errors(path, "is cut short, damaged or no video"), av.open(str(path)) as container:
        if not container.streams.video:
            raise StorageError("there is no video in this file", path=path)
        yield container, container.streams.video[0]


@contextmanager
def storage_errors(path: Path, what: str) -> Iterator[None]:
    """Turn errors of FFmpeg and the system into a StorageError: "it <what>: <error> (path ...)"."""
    try:
        yield
    except StorageError:
        raise
    except (av.error.FFmpegError, OSError) as error:
        raise StorageError(f"it {what}: {error}", path=path) from error


def _codec_name(decoder: str) -> str:
    """Our name of what FFmpeg calls by its decoder: hevc is h265."""
    return {"hevc": "h265"}.get(decoder, decoder)
