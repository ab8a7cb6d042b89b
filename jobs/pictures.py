"""Frames of a shot as small JPEG pictures, spread evenly over what there is of it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av

from longtake.engine.footage import open_video, probe
from longtake.kernels.errors import StorageError

WIDTH = 240
_SEGMENTS = "segments"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A frame at ``time_s`` of its shot, as the address of a picture that carries itself."""

    time_s: float
    data_url: str


def shot_pictures(folder: Path, count: int) -> list[Picture]:
    """Pictures of a shot's video, or of its finished segments while there is none.

    Args:
        folder: DIR/<shot>.
        count: how many at most.
    """
    whole = folder / f"{folder.name}.mp4"
    files = [whole] if whole.exists() else sorted((folder / _SEGMENTS).glob("*.mp4"))
    lengths = []
    for file in files:
        try:
            lengths.append(probe(file))
        except StorageError:  # damaged, or being replaced; verify is there to say so
            return []
    num_frames = sum(info.frames for info in lengths)
    count = min(count, num_frames)
    wanted = [round(index * (num_frames - 1) / max(1, count - 1)) for index in range(count)]
    pictures, before = [], 0
    for file, info in zip(files, lengths, strict=True):
        own = [number - before for number in wanted if before <= number < before + info.frames]
        for number, frame in _frames(file, own, info.fps):
            pictures.append(Picture(time_s=float((before + number) / info.fps), data_url=_jpeg(frame)))
        before += info.frames
    return pictures


def _frames(path: Path, numbers: list[int], fps: Fraction) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames by number, each decoded from the key frame before it."""
    for number in numbers:
        with open_video(path) as (container, stream):
            assert stream.time_base is not None
            begin = stream.start_time or 0
            container.seek(begin + int(number / fps / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.pts is not None and round((frame.pts - begin) * stream.time_base * fps) >= number:
                    yield number, frame
                    break


def _jpeg(frame: av.VideoFrame) -> str:
    width = min(WIDTH, frame.width) // 2 * 2
    height = max(2, round(frame.height * width / frame.width) // 2 * 2)
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = width, height, "yuvj420p", Fraction(1, 25)
    encoder.options = {"q:v": "4"}
    small = frame.reformat(width=width, height=height, format="yuvj420p", dst_color_range="JPEG")
    small.pts = 0
    data = b"".join(bytes(packet) for packet in [*encoder.encode(small), *encoder.encode(None)])
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
