"""The kinds of video that longtake writes and what they can store. Sizes are (height, width), as in tensor shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from av.video.reformatter import Interpolation

from longtake.kernels.errors import ConfigError

EXACT_SCALING = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoCodec:
    """How one kind of video is encoded and stored.

    Args:
        encoder: FFmpeg's name of it.
        suffix: of its files.
        container: FFmpeg's name of the file format.
        pixels: stored pixel format.
        options: of the encoder.
        reorder_frames: how far decoding order runs ahead of display order (B frames).
        multiples: what height and width must divide by.
        tag: code of the codec in the file, where FFmpeg's choice plays on fewer machines.
    """

    encoder: str
    suffix: str
    container: str
    pixels: str
    options: dict[str, str] = field(default_factory=dict)
    reorder_frames: int = 0
    multiples: tuple[int, int] = (1, 1)
    tag: str | None = None


CODECS: dict[str, VideoCodec] = {
    # mbtree=0: with macroblock trees x264's SIMD code reads memory it has not written, so the bytes vary between runs
    "h264": VideoCodec(
        encoder="libx264",
        suffix=".mp4",
        container="mp4",
        pixels="yuv420p",
        options={"preset": "medium", "crf": "17", "x264-params": "mbtree=0:open-gop=0:bframes=3:b-pyramid=normal"},
        reorder_frames=2,
        multiples=(2, 2),
    ),
    "h265": VideoCodec(
        encoder="libx265",
        suffix=".mp4",
        container="mp4",
        pixels="yuv420p",
        options={
            "preset": "medium",
            "crf": "19",
            "x265-params": "pools=none:frame-threads=1:open-gop=0:bframes=3:b-pyramid=1:info=0:log-level=error",
        },
        reorder_frames=2,
        multiples=(2, 2),
        tag="hvc1",
    ),
    "prores": VideoCodec(
        encoder="prores_ks",
        suffix=".mov",
        container="mov",
        pixels="yuv422p10le",
        options={"profile": "hq"},
        multiples=(1, 2),
    ),
    "ffv1": VideoCodec(
        encoder="ffv1",
        suffix=".mkv",
        container="matroska",
        pixels="bgr0",
        options={"level": "3", "slices": "4", "slicecrc": "1"},
    ),
}
"""h264: plays everywhere. h265: smaller, slower. prores: 4:2:2 10 bits, for editing. ffv1: lossless RGB."""


def video_codec(name: str) -> VideoCodec:
    """A codec by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in CODECS:
        raise ConfigError(f"unknown video codec {name!r}: one of {', '.join(CODECS)}")
    return CODECS[name]


def parse_fps(fps: Fraction | int | float | str) -> Fraction:
    """Frames a second as an exact fraction: 16, "24000/1001", 29.97 (which becomes 30000/1001).

    Raises:
        ConfigError: it is no positive number up to 1000.
    """
    try:
        exact = Fraction(fps)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"fps {fps!r} is not a number: write 16 or '24000/1001'") from error
    if exact.denominator > 1001:
        near_ntsc = Fraction(round(exact * 1001 / 1000) * 1000, 1001)
        exact = near_ntsc if abs(near_ntsc - exact) < Fraction(1, 100) else exact.limit_denominator(1001)
    if not 0 < exact <= 1000:
        raise ConfigError(f"fps {fps!r} is out of range: above 0, at most 1000")
    return exact


def check_geometry(codec: str, path: Path, size: tuple[int, int]) -> None:
    """Raise a ConfigError if the codec does not store frames of this height and width, or not under this suffix."""
    kind = video_codec(codec)
    if path.suffix != kind.suffix:
        raise ConfigError(f"video codec {codec} goes into {kind.suffix} files", path=path)
    for name, pixels, multiple in zip(("height", "width"), size, kind.multiples, strict=True):
        if pixels < 1 or pixels % multiple:
            raise ConfigError(
                f"{name} {pixels} does not go with video codec {codec}: it stores positive multiples of {multiple}; "
                f"use {max(multiple, pixels // multiple * multiple)}, or ffv1, which stores any size",
                path=path,
            )
