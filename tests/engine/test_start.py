"""Pictures, clips and videos as latents: the bits of encoding the frames in one go."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longtake.engine.config import (
    BeatConfig,
    HistoryConfig,
    MediaConfig,
    ModelConfig,
    ModelSpec,
    SamplerConfig,
    ShotConfig,
)
from longtake.engine.footage import read_frames
from longtake.engine.latents import LatentLog
from longtake.engine.start import clip_latents, fitted, last_frame_latents, picture_latents, write_guide
from longtake.engine.vae import StreamingDecoder, StreamingEncoder
from longtake.engine.video import SegmentWriter
from longtake.kernels.errors import ConfigError, StorageError

HEIGHT, WIDTH = 32, 48


@pytest.fixture(scope="module")
def encoder() -> StreamingEncoder:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return StreamingEncoder(vae.eval().requires_grad_(False))


def frames_of(count: int, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """A moving gradient, which a codec keeps well."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frames = [torch.stack([x * 4 + n, y * 5, x + y + 2 * n], dim=-1) % 256 for n in range(count)]
    return torch.stack(frames).to(torch.uint8)


def video(path: Path, count: int, height: int = HEIGHT, width: int = WIDTH) -> MediaConfig:
    with SegmentWriter(path, fps=16, size=(height, width)) as writer:
        writer.write(frames_of(count, height, width))
    return MediaConfig(path=path, sha256="0")


def make_shot(num_blocks: int = 3, **start: object) -> ShotConfig:
    sampler, history = SamplerConfig(), HistoryConfig()
    spec = ModelSpec(
        path=Path("unused"),
        name="test",
        transformer=ModelConfig(num_heads=1, head_dim=16, num_layers=1, ffn_dim=8),
        sampler=sampler,
        block_frames=2,
        fps=16,
        height=HEIGHT,
        width=WIDTH,
        text_len=4,
        history=history,
    )
    return ShotConfig(
        name="shot",
        model=spec,
        num_frames=1 + 4 * (2 * num_blocks - 1) - 2,
        fps=16,
        height=HEIGHT,
        width=WIDTH,
        seed=0,
        beats=(BeatConfig(at_s=0, prompt="a"),),
        sampler=sampler,
        history=history,
        **start,  # type: ignore[arg-type]
    )


def decoded(path: Path) -> Tensor:
    return torch.from_numpy(np.stack(list(read_frames(path))))


def in_one_go(encoder: StreamingEncoder, frames: Tensor) -> Tensor:
    encoder.reset()
    return encoder.encode(frames)


def test_a_picture(encoder: StreamingEncoder, tmp_path: Path) -> None:
    pixels = frames_of(1)[0].numpy()
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt, codec.time_base = HEIGHT, WIDTH, "rgb24", 1  # type: ignore[assignment]
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    data = b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])
    (tmp_path / "a.png").write_bytes(data)
    shot = make_shot(image=MediaConfig(path=tmp_path / "a.png", sha256="0"))
    latents = picture_latents(shot, encoder)
    assert latents.shape == (16, 1, 4, 6)
    assert torch.equal(latents, in_one_go(encoder, torch.from_numpy(pixels)[None]))


@pytest.mark.parametrize("num_latents", [1, 3])
def test_the_last_frame_of_a_shot(encoder: StreamingEncoder, tmp_path: Path, num_latents: int) -> None:
    """Of a shot of one latent, too, which has nothing before its last frame."""
    log = LatentLog(tmp_path / "latents.zarr", num_latents, (16, 1, 4, 6))
    latents = torch.randn(16, num_latents, 4, 6, generator=torch.Generator().manual_seed(1))
    for block in range(num_latents):
        log.write(block, latents[:, block : block + 1])
    decoder = StreamingDecoder(encoder.vae)
    frames = decoder.decode(latents)
    shot = make_shot()
    found = last_frame_latents(replace(shot, model=replace(shot.model, block_frames=1)), log, decoder)
    assert torch.equal(found, in_one_go(encoder, frames[-1:]))


def test_frames_cover_the_size_and_are_cut_at_the_edges(tmp_path: Path) -> None:
    media = video(tmp_path / "a.mp4", 2, 64, 128)
    found = list(fitted(media.path, HEIGHT, WIDTH))
    assert [frame.shape for frame in found] == [(HEIGHT, WIDTH, 3)] * 2
    whole = next(fitted(media.path, HEIGHT, 64))
    assert np.array_equal(found[0], whole[:, 8:56])


def test_a_clips_last_blocks(encoder: StreamingEncoder, tmp_path: Path) -> None:
    media = video(tmp_path / "a.mp4", 30)
    blocks = clip_latents(make_shot(clip=media, after_blocks=2), encoder)
    assert [tuple(block.shape) for block in blocks] == [(16, 2, 4, 6)] * 2
    expected = in_one_go(encoder, decoded(media.path)[-13:])
    assert torch.equal(torch.cat(blocks, dim=1), expected)
    with pytest.raises(ConfigError, match="the clip has 30 frames, 37 are needed"):
        clip_latents(make_shot(clip=media, after_blocks=5), encoder)


@pytest.mark.parametrize("count", [19, 21, 40])
def test_a_video_to_follow(encoder: StreamingEncoder, tmp_path: Path, count: int) -> None:
    media = video(tmp_path / "a.mp4", count)
    shot = make_shot(guide=media)
    assert (shot.num_frames, shot.num_blocks) == (19, 3)
    guide = write_guide(shot, tmp_path, encoder)
    frames = decoded(media.path)[:21]
    padded = torch.cat([frames, frames[-1:].expand(21 - len(frames), -1, -1, -1)])
    expected = in_one_go(encoder, padded)
    again = pickle.loads(pickle.dumps(guide))
    assert torch.equal(torch.cat([again(block) for block in range(3)], dim=1), expected)
    media.path.unlink()
    assert write_guide(shot, tmp_path, encoder) == guide  # an earlier run's latents are there


def test_a_video_that_is_too_short_or_none(encoder: StreamingEncoder, tmp_path: Path) -> None:
    media = video(tmp_path / "a.mp4", 18)
    with pytest.raises(ConfigError, match="the video has 18 frames, the shot 19"):
        write_guide(make_shot(guide=media), tmp_path, encoder)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(StorageError):
        picture_latents(make_shot(image=MediaConfig(path=tmp_path / "b.png", sha256="0")), encoder)
