"""Pictures and videos that a film names: whoever made them, and nothing else of the machine's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from longtake.engine.config import MediaConfig, ModelSpec, ShotConfig
from longtake.jobs.film import parse_film
from longtake.jobs.resolve import resolve
from longtake.kernels.errors import ConfigError

SHOT = '[[shot]]\nname = "a"\nduration = "2s"\nprompt = "p"\n'


def write(path: Path, num_frames: int, *, every_ms: Callable[[int], int] = lambda number: 40) -> None:
    """A small MPEG-4 video or, by its name, PNG; frames are shown after so many milliseconds each."""
    with av.open(str(path), "w", format="image2" if path.suffix == ".png" else None) as container:
        stream = container.add_stream("png" if path.suffix == ".png" else "mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "rgb24" if path.suffix == ".png" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        shown_ms = 0
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 4 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = shown_ms, Fraction(1, 1000)
            shown_ms += every_ms(number)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def resolved(spec: ModelSpec, home: Path, text: str) -> ShotConfig:
    return resolve(parse_film(SHOT + text, str(home / "film.toml")), lambda name: spec)["a"]


def test_what_a_shot_starts_from(spec: ModelSpec, tmp_path: Path) -> None:
    write(tmp_path / "a.png", 1)
    write(tmp_path / "b.mp4", 32)
    config = resolved(spec, tmp_path, 'image = "a.png"\n')
    sha256 = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    assert config.image == MediaConfig(path=tmp_path / "a.png", sha256=sha256)
    assert (config.continues, config.num_latents, config.after_blocks) == (False, 9, 0)
    config = resolved(spec, tmp_path, f'video = "{tmp_path}/b.mp4"\n')
    assert (config.guide is not None, config.strength) == (True, 0.6)


@pytest.mark.parametrize(("wanted", "blocks"), [("", 3), ("after_blocks = 2\n", 2)])
@pytest.mark.parametrize("every_ms", [lambda number: 40, lambda number: 20 + 7 * (number % 5)])
def test_a_clip_is_history_whatever_its_rate(
    spec: ModelSpec, tmp_path: Path, wanted: str, blocks: int, every_ms: Callable[[int], int]
) -> None:
    write(tmp_path / "c.mp4", 40, every_ms=every_ms)
    config = resolved(spec, tmp_path, 'clip = "c.mp4"\n' + wanted)
    assert (config.continues, config.after_blocks, config.num_latents) == (True, blocks, 8)
    with pytest.raises(ConfigError, match="4 is more than the clip has; write at most 3"):
        resolved(spec, tmp_path, 'clip = "c.mp4"\nafter_blocks = 4\n')


@pytest.mark.parametrize("key", ["image", "clip", "video"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.png", r"cannot be read \(No such file or directory\); name an existing file"),
        ("loop", r"cannot be read \(.*\); name an existing file"),
        ("film.toml/x", r"cannot be read \(Not a directory\); name an existing file"),
        ("film.toml", r"is no picture or video that can be read \(Invalid data found when processing input\)"),
        ("empty.mp4", r"is no picture or video that can be read \(Invalid data found when processing input\)"),
        (".", "is no file; name a picture or a video"),
        ("fifo", "is no file; name a picture or a video"),
        ("../secret.png", "is not in the film's folder; copy it there"),
        ("link.png", "is not in the film's folder; copy it there"),
        ("linked/secret.png", "is not in the film's folder; copy it there"),
        ("/dev/zero", "is not in the film's folder; copy it there"),
    ],
)
def test_what_is_none(spec: ModelSpec, tmp_path: Path, key: str, name: str, message: str) -> None:
    write(tmp_path / "secret.png", 1)
    home = tmp_path / "home"
    home.mkdir()
    (home / "film.toml").write_text("no picture")
    (home / "empty.mp4").touch()
    os.mkfifo(home / "fifo")
    for link, target in (("loop", "loop"), ("link.png", "../secret.png"), ("linked", "..")):
        (home / link).symlink_to(target)
    with pytest.raises(ConfigError, match=rf"film\.toml:5: shot\.{key}: \"{name}\" {message}$") as caught:
        resolved(spec, home, f'{key} = "{name}"\n')
    assert len(str(caught.value).splitlines()) == 1


def test_a_film_folder_that_is_a_link_holds_its_own(spec: ModelSpec, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to("home")
    write(tmp_path / "home" / "a.png", 1)
    assert resolved(spec, tmp_path / "link", 'image = "a.png"\n').image is not None


@pytest.mark.parametrize(
    ("key", "num_frames", "message"),
    [
        ("clip", 8, "shot.clip: has 8 frames; a block of history takes 9"),
        ("video", 31, r"shot.video: has 31 frames, and the shot 32 \(16 a second\); shorten the shot"),
    ],
)
def test_too_short(spec: ModelSpec, tmp_path: Path, key: str, num_frames: int, message: str) -> None:
    write(tmp_path / "a.mp4", num_frames)
    with pytest.raises(ConfigError, match=f"film.toml:5: {message}"):
        resolved(spec, tmp_path, f'{key} = "a.mp4"\n')
