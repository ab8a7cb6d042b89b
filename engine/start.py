"""What a shot starts from, as latents: another shot's last blocks or frame, a clip's, a picture, a video to follow.

A video to follow is encoded once, before the first block, into a log of latents in the shot's folder: it is small,
every rank reads it, and a shot that goes on reads the same bytes. Shapes: C latent channels, F latent frames of a
block, Y and X latent rows and columns; H and W pixels high and wide.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from av.video.reformatter import ColorRange, VideoReformatter
from torch import Tensor

from longtake.engine.config import ShotConfig
from longtake.engine.footage import Frames, open_video, storage_errors
from longtake.engine.latents import LatentLog
from longtake.engine.vae import StreamingDecoder, StreamingEncoder, receptive_latents
from longtake.engine.video_codec import EXACT_SCALING
from longtake.kernels.errors import ConfigError

GUIDE_NAME = "guide.zarr"


@dataclass(frozen=True, slots=True)
class Guide:
    """Latents of a video to follow; a pure function that pickles.

    Args:
        path: of the log that :func:`write_guide` made.
    """

    path: Path

    def __call__(self, block: int) -> Tensor:
        """Clean latents of one block, float32 [C, F, Y, X] on the CPU."""
        return LatentLog.existing(self.path).read(block, block + 1)


def picture_latents(shot: ShotConfig, encoder: StreamingEncoder) -> Tensor:
    """The picture that a shot begins with: normalised latents, float32 [C, 1, Y, X].

    Raises:
        StorageError: it cannot be read.
    """
    assert shot.image is not None
    frame = next(fitted(shot.image.path, shot.height, shot.width))
    encoder.reset()
    return encoder.encode(torch.from_numpy(frame)[None])


def last_frame_latents(shot: ShotConfig, before: LatentLog, decoder: StreamingDecoder) -> Tensor:
    """The last frame of another shot, as the picture that this one begins with: float32 [C, 1, Y, X].

    It is decoded from that shot's latents, not from its video, which has lost detail.

    Args:
        shot: that begins with it.
        before: latents of the other, finished.
        decoder: of the model's VAE; it is reset.

    Raises:
        StorageError: the latents are damaged.
    """
    num_blocks = min(len(before), 1 + -(-receptive_latents(decoder.vae) // shot.model.block_frames))
    blocks = range(len(before) - num_blocks, len(before))
    latents = torch.cat([before.read(block, block + 1) for block in blocks], dim=1)
    decoder.reset()
    if latents.shape[1] > 1:
        decoder.warm_up(latents[:, :-1])
    frame = decoder.decode(latents[:, -1:])[-1:]
    decoder.reset()
    encoder = StreamingEncoder(decoder.vae)
    return encoder.encode(frame)


def clip_latents(shot: ShotConfig, encoder: StreamingEncoder) -> tuple[Tensor, ...]:
    """The last blocks of the clip that a shot continues, oldest first: float32 [C, F, Y, X] each.

    Raises:
        ConfigError: it is shorter than the shot was told.
        StorageError: it cannot be read.
    """
    assert shot.clip is not None
    num_latents = shot.after_blocks * shot.model.block_frames
    num_frames = 1 + (num_latents - 1) * shot.model.temporal_stride
    frames = deque(fitted(shot.clip.path, shot.height, shot.width), maxlen=num_frames)
    if len(frames) < num_frames:
        raise ConfigError(f"the clip has {len(frames)} frames, {num_frames} are needed", path=shot.clip.path)
    encoder.reset()
    latents = torch.cat([encoder.encode(torch.from_numpy(frame)[None]) for frame in frames], dim=1)
    return tuple(torch.split(latents, shot.model.block_frames, dim=1))


def write_guide(shot: ShotConfig, folder: Path, encoder: StreamingEncoder) -> Guide:
    """Encode the video that a shot follows, from where an earlier run stopped being sure.

    Args:
        shot: with its guide.
        folder: of the shot; the log goes there.
        encoder: of the model's VAE.

    Raises:
        ConfigError: the video is shorter than the shot.
        StorageError: it cannot be read, or the log not written.
    """
    assert shot.guide is not None
    log = LatentLog(folder / GUIDE_NAME, shot.num_blocks, shot.latent_shape)
    if log.num_written() < shot.num_blocks:
        encoder.reset()
        blocks = _blocks(shot, encoder)
        for block in range(shot.num_blocks):
            log.write(block, next(blocks))
    return Guide(folder / GUIDE_NAME)


def fitted(path: Path, height: int, width: int) -> Iterator[Frames]:
    """Frames of a picture or video, scaled to cover a size and cut at the edges: uint8 RGB [H, W, 3]."""
    reformatter = VideoReformatter()
    with open_video(path) as (container, stream), storage_errors(path, "is cut short or damaged"):
        for frame in container.decode(stream):
            scale = max(height / frame.height, width / frame.width)
            high, wide = max(height, round(frame.height * scale)), max(width, round(frame.width * scale))
            scaled = reformatter.reformat(
                frame,
                width=wide,
                height=high,
                format="rgb24",
                dst_color_range=ColorRange.JPEG,
                interpolation=EXACT_SCALING,
                threads=1,
            )
            top, left = (high - height) // 2, (wide - width) // 2
            pixels = np.asarray(scaled.to_ndarray(), dtype=np.uint8)
            yield np.ascontiguousarray(pixels[top : top + height, left : left + width])


def _blocks(shot: ShotConfig, encoder: StreamingEncoder) -> Iterator[Tensor]:
    """The guide's latents block by block; behind its end its last frame goes on, to the end of the last block."""
    assert shot.guide is not None
    pending: list[Tensor] = []
    held = 0
    for frame in _held(shot, shot.guide.path):
        latents = encoder.encode(torch.from_numpy(frame)[None])
        pending.append(latents)
        held += latents.shape[1]
        if held == shot.model.block_frames:
            yield torch.cat(pending, dim=1)
            pending, held = [], 0


def _held(shot: ShotConfig, path: Path) -> Iterator[Frames]:
    wanted = shot.frames_of_latents(shot.num_blocks * shot.model.block_frames)
    count, frame = 0, None
    for frame in fitted(path, shot.height, shot.width):
        if count == wanted:
            return
        yield frame
        count += 1
    if frame is None or count < shot.num_frames:
        raise ConfigError(f"the video has {count} frames, the shot {shot.num_frames}: shorten the shot", path=path)
    for _ in range(wanted - count):
        yield frame
