"""Films that start from pictures, clips and videos, and prompts that change: rendered, stopped, and gone on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from longtake.engine.config import ShotConfig
from longtake.engine.footage import probe, read_frames
from longtake.engine.latents import LatentLog
from longtake.engine.shot import ShotRenderer, ShotResult
from longtake.engine.vae import StreamingDecoder, StreamingEncoder
from longtake.engine.vae_model import load_vae
from longtake.engine.video import SegmentWriter
from longtake.engine.weights import read_spec
from longtake.jobs.film import parse_film
from longtake.jobs.resolve import resolve

SHOT = '[[shot]]\nname = "a"\nduration = "5s"\nprompt = "p"\nseed = 3\n'
BEAT = '[[shot.beat]]\nat = "2s"\nprompt = "q"\n'
CASES = {
    "image": 'image = "in.mp4"\n',
    "clip": 'clip = "in.mp4"\n',
    "video": 'video = "in.mp4"\nstrength = 0.5\n',
    "recache": BEAT + 'switch = "recache"\n',
    "flush over a transition": BEAT + 'switch = "flush"\ntransition = "2s"\n',
    "cut": BEAT + 'switch = "cut"\n',
    "weights in 8 bits": 'weights = "fp8"\n',
    "bounded positions, jitter": 'history.positions = "bounded"\nhistory.jitter = 0.5\nhistory.head_jitter = 0.8\n',
}


@pytest.fixture(scope="module")
def rolling_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rolling") / "tiny"
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "longtake.json").read_text())
    (folder / "longtake.json").write_text(json.dumps(settings | {"loop": "rolling", "timesteps": [1000, 600, 300]}))
    return folder


def render(text: str, model: Path, home: Path, out: str, stop_at: int | None = None) -> list[Path]:
    """Render the film's shot, or its first blocks; the segments."""
    (shot,) = resolve(parse_film(text, str(home / "film.toml")), lambda name: read_spec(str(model))).values()
    blocks = 0

    def stop() -> bool:
        nonlocal blocks
        blocks += 1
        return stop_at is not None and blocks > stop_at

    result = ShotRenderer()(shot, home / out / "a", "cpu", stop=stop, progress=lambda report: None)
    assert result.finished == (stop_at is None)
    return list(result.segments)


def frames_of(segments: list[Path]) -> list[bytes]:
    return [frame.tobytes() for segment in segments for frame in read_frames(segment)]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    ramp = torch.arange(64 * 96 * 3).reshape(1, 64, 96, 3) // 97
    frames = torch.cat([(ramp + 3 * n) % 256 for n in range(48)]).to(torch.uint8)
    with SegmentWriter(tmp_path / "in.mp4", fps=8, size=(64, 96)) as writer:
        writer.write(frames)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_goes_on_to_the_same_film(case: str, tiny_model: Path, home: Path) -> None:
    whole = render(SHOT + CASES[case], tiny_model, home, "whole")
    assert sum(probe(segment).frames for segment in whole) == 40
    render(SHOT + CASES[case], tiny_model, home, "parts", stop_at=3)
    parts = render(SHOT + CASES[case], tiny_model, home, "parts")
    assert [segment.read_bytes() for segment in parts] == [segment.read_bytes() for segment in whole]
    assert frames_of(whole) != frames_of(render(SHOT, tiny_model, home, "plain"))


def test_a_rolling_window_goes_on(rolling_model: Path, home: Path) -> None:
    whole = render(SHOT, rolling_model, home, "whole")
    render(SHOT, rolling_model, home, "parts", stop_at=2)
    parts = render(SHOT, rolling_model, home, "parts")
    assert [segment.read_bytes() for segment in parts] == [segment.read_bytes() for segment in whole]


def test_the_last_frame_of_another_shot(tiny_model: Path, home: Path) -> None:
    text = SHOT + '[[shot]]\nname = "b"\nduration = "3s"\nprompt = "q"\nafter = "a"\nafter_blocks = 0\n'
    before, shot = resolve(parse_film(text, str(home / "film.toml")), lambda name: read_spec(str(tiny_model))).values()
    renderer = ShotRenderer()

    def rendered(config: ShotConfig, folder: Path, num_blocks: int) -> ShotResult:
        left = iter(range(num_blocks))
        stop = lambda: next(left, None) is None  # noqa: E731
        return renderer(config, folder, "cpu", stop=stop, progress=lambda report: None)

    for out, parts in (("whole", [99]), ("parts", [1, 99])):
        rendered(before, home / out / "a", 99)
        results = [rendered(shot, home / out / "b", num_blocks) for num_blocks in parts]
        assert results[-1].finished
    whole, parts_of = (list((home / out / "b" / "segments").iterdir()) for out in ("whole", "parts"))
    assert [file.read_bytes() for file in whole] == [file.read_bytes() for file in parts_of]
    assert sum(probe(segment).frames for segment in whole) == 24
    vae = load_vae(tiny_model / "vae", dtype=torch.float32, device=torch.device("cpu"))
    latents = LatentLog.existing(home / "whole" / "a" / "latents.zarr")
    last = StreamingDecoder(vae).decode(latents.read(0, len(latents)))[-1:]  # all of it, from the start
    first = LatentLog.existing(home / "whole" / "b" / "latents.zarr").read(0, 1)[:, :1]
    assert torch.equal(first, StreamingEncoder(vae).encode(last))
