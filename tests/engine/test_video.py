"""Segments: whole or not there, the same bytes for the same frames, and joined without touching a frame."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from longtake.engine.footage import Frames, VideoInfo, inspect_video, probe
from longtake.engine.video import SegmentWriter, join
from longtake.engine.video_codec import CODECS, parse_fps
from longtake.kernels.errors import ConfigError, StorageError
from tests.engine.small_videos import HEIGHT, WIDTH, decode, moving, write


def psnr(a: Frames, b: Frames) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num", [1, 2, 3, 20])
def test_frames_come_back(codec: str, num: int, tmp_path: Path) -> None:
    frames = moving(num)
    path = tmp_path / f"a{CODECS[codec].suffix}"
    with SegmentWriter(path, fps="24000/1001", size=(HEIGHT, WIDTH), codec=codec) as writer:
        writer.write(torch.from_numpy(frames[:1]))
        writer.write(frames[1:])
        assert not path.exists()
    info = VideoInfo(frames=num, fps=Fraction(24000, 1001), height=HEIGHT, width=WIDTH, codec=codec)
    assert probe(path) == info
    assert info.duration_s == pytest.approx(num * 1001 / 24000)
    assert os.listdir(tmp_path) == [path.name]
    if codec == "ffv1":
        assert np.array_equal(decode(path), frames)
    else:
        assert psnr(decode(path), frames) > 28  # the grain is lost


@pytest.mark.parametrize("codec", CODECS)
def test_colours_come_back(codec: str, tmp_path: Path) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (6, HEIGHT, WIDTH, 3))
    path = write(tmp_path / f"a{CODECS[codec].suffix}", np.ascontiguousarray(frames), codec)
    off = np.abs(decode(path).astype(int) - frames).max()
    assert off <= 3
    if codec != "ffv1":
        with av.open(str(path)) as container:
            context = container.streams.video[0].codec_context
            assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)


@pytest.mark.parametrize("codec", CODECS)
def test_no_gop_reaches_outside_its_segment(codec: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{CODECS[codec].suffix}", moving(40, seed=3), codec, fps=8)
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    assert packets[0].is_keyframe and packets[0].pts == 0
    keys = [index for index, packet in enumerate(packets) if packet.is_keyframe]
    assert len(keys) >= 3  # every two seconds at least
    for key in keys:  # closed: what is decoded from a key frame on is shown from it on
        assert min(p.pts for p in packets[key:] if p.pts is not None) == packets[key].pts


ENCODE = """
import sys
from pathlib import Path
import numpy as np
from longtake.engine.video import SegmentWriter
frames = np.load(sys.argv[1])
for codec, suffix in [("h264", "mp4"), ("h265", "mp4"), ("prores", "mov"), ("ffv1", "mkv")]:
    path = Path(sys.argv[2]) / f"{codec}.{suffix}"
    with SegmentWriter(path, fps=16, size=frames.shape[1:3], codec=codec) as writer:
        writer.write(frames)
"""


def test_same_frames_same_bytes_in_any_process(tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", moving(36, 96, 160))
    outputs: list[dict[str, bytes]] = []
    for fill in ("1", "170", "255"):  # glibc fills fresh memory with it: nothing unwritten may reach a file
        folder = tmp_path / fill
        folder.mkdir()
        result = run_python(ENCODE, tmp_path / "frames.npy", folder, MALLOC_PERTURB_=fill)
        assert result.returncode == 0, result.stderr
        outputs.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(outputs[0]) == len(CODECS)
    assert outputs[0] == outputs[1] == outputs[2]


def test_the_split_of_writes_does_not_matter(tmp_path: Path) -> None:
    frames = moving(12)
    whole = write(tmp_path / "whole.mp4", frames)
    with SegmentWriter(tmp_path / "split.mp4", fps=16, size=(HEIGHT, WIDTH)) as writer:
        for start, end in ((0, 1), (1, 1), (1, 5), (5, 12)):
            writer.write(torch.from_numpy(frames[start:end]))
    assert whole.read_bytes() == (tmp_path / "split.mp4").read_bytes()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("lengths", [(9,), (5, 1, 7), (1, 2, 3, 12), (16, 1)], ids=str)
def test_join_keeps_every_frame_and_counts_time_evenly(codec: str, lengths: Sequence[int], tmp_path: Path) -> None:
    suffix = CODECS[codec].suffix
    paths = [
        write(tmp_path / f"{i}{suffix}", moving(num, seed=i), codec, "30000/1001") for i, num in enumerate(lengths)
    ]
    film = tmp_path / f"film{suffix}"
    info = join(paths, film)
    assert info == probe(film)
    assert info.frames == sum(lengths) and info.fps == Fraction(30000, 1001)
    assert np.array_equal(decode(film), np.concatenate([decode(path) for path in paths]))
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.size]
        times = sorted(p.pts * p.time_base for p in packets if p.pts is not None and p.time_base is not None)
    assert times[0] == 0
    assert all(abs(time - i * Fraction(1001, 30000)) <= Fraction(1, 2000) for i, time in enumerate(times))
    orders = [p.dts for p in packets if p.dts is not None]
    assert orders == sorted(set(orders)) and len(orders) == info.frames
    first = film.read_bytes()
    join(paths, film)
    assert film.read_bytes() == first
    assert sorted(os.listdir(tmp_path)) == sorted([film.name, *(path.name for path in paths)])


def test_shots_join_to_a_film(tmp_path: Path) -> None:
    shots = []
    for shot in range(2):
        parts = [write(tmp_path / f"{shot}-{i}.mp4", moving(6, seed=10 * shot + i)) for i in range(2)]
        shots.append(tmp_path / f"shot{shot}.mp4")
        join(parts, shots[-1])
    join(shots, tmp_path / "film.mp4")
    all_segments = [tmp_path / f"{shot}-{i}.mp4" for shot in range(2) for i in range(2)]
    assert probe(tmp_path / "film.mp4").frames == 24
    assert np.array_equal(decode(tmp_path / "film.mp4"), np.concatenate([decode(path) for path in all_segments]))
    data = (tmp_path / "film.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_h265_is_tagged_for_players(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving(4), "h265")
    join([path, path], tmp_path / "film.mp4")
    for name in ("a.mp4", "film.mp4"):
        assert b"hvc1" in (tmp_path / name).read_bytes()


def test_files_carry_no_dates_or_tools(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving(4))
    join([path], tmp_path / "film.mp4")
    for name in ("a.mp4", "film.mp4"):
        with av.open(str(tmp_path / name)) as container:
            assert not {"creation_time", "encoder"} & container.metadata.keys()
            assert "creation_time" not in container.streams.video[0].metadata


def test_what_does_not_fit_together_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write(tmp_path / "base.mp4", moving(3))
    others = {
        "size differs: base.mp4 has 64x48": write(tmp_path / "size.mp4", moving(3, 48, 80)),
        "fps differs: base.mp4 has 16": write(tmp_path / "fps.mp4", moving(3), fps=24),
        "codec differs: base.mp4 has h264": write(tmp_path / "codec.mp4", moving(3), "h265"),
    }
    h264 = CODECS["h264"]
    with monkeypatch.context() as patched:  # as another version of longtake may
        patched.setitem(CODECS, "h264", replace(h264, options={**h264.options, "crf": "30"}))
        others["encoder settings differ"] = write(tmp_path / "quality.mp4", moving(3))
    for message, other in others.items():
        with pytest.raises(ConfigError, match=message):
            join([base, other], tmp_path / "film.mp4")
    with pytest.raises(ConfigError, match="no segments"):
        join([], tmp_path / "film.mp4")
    with pytest.raises(ConfigError, match=r"\.mp4 segments join to a \.mp4 file"):
        join([base], tmp_path / "film.mkv")
    with pytest.raises(StorageError, match="no such video"):
        join([base, tmp_path / "absent.mp4"], tmp_path / "film.mp4")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("film")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (48, 63)}, "width 63 does not go with video codec h264.*use 62, or ffv1"),
        ({"size": (47, 64)}, "height 47"),
        ({"size": (48, 0)}, "use 2"),
        ({"codec": "theora"}, "unknown video codec 'theora': one of h264"),
        ({"codec": "ffv1"}, r"goes into \.mkv files"),
        ({"fps": 0}, "out of range"),
        ({"fps": "fast"}, "not a number"),
        ({"fps": "1/0"}, "not a number"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    settings: dict[str, object] = {"fps": 16, "size": (48, 64), **arguments}
    with pytest.raises(ConfigError, match=message):
        SegmentWriter(tmp_path / "a.mp4", **settings)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_ffv1_stores_odd_sizes(tmp_path: Path) -> None:
    frames = moving(3, 33, 47)
    assert np.array_equal(decode(write(tmp_path / "a.mkv", frames, "ffv1")), frames)


def test_bad_frames_are_named(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path / "a.mp4", fps=16, size=(HEIGHT, WIDTH))
    for frames in (torch.zeros(1, HEIGHT, WIDTH, 3), torch.zeros(1, WIDTH, HEIGHT, 3, dtype=torch.uint8)):
        with pytest.raises(ConfigError, match=r"uint8 \[N, 48, 64, 3\]"):
            writer.write(frames)
    with pytest.raises(ConfigError, match="at least one frame"):
        writer.close()
    with pytest.raises(ConfigError, match="closed"):
        writer.write(moving(1))
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be made"):
        SegmentWriter(tmp_path / "absent" / "a.mp4", fps=16, size=(HEIGHT, WIDTH))


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), SegmentWriter(tmp_path / "a.mp4", fps=16, size=(HEIGHT, WIDTH)) as writer:
        writer.write(moving(3))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


KILLED = """
import signal, sys
import numpy as np
from longtake.engine.video import SegmentWriter
writer = SegmentWriter(sys.argv[1], fps=16, size=(48, 64), codec=sys.argv[2])
writer.write(np.random.default_rng(0).integers(0, 256, (80, 48, 64, 3), dtype=np.uint8))
print("written", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("codec", ["h264", "ffv1"])
def test_a_killed_writer_leaves_no_segment(codec: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{CODECS[codec].suffix}"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path), codec], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path) == [f"{path.name}.partial"]
    with pytest.raises(StorageError):
        probe(tmp_path / f"{path.name}.partial")
    fresh = write(path, moving(4), codec)
    assert os.listdir(tmp_path) == [fresh.name]


FULL_DISK = """
import resource, signal, sys
import numpy as np
from longtake.engine.video import SegmentWriter
from longtake.kernels.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
try:
    with SegmentWriter(sys.argv[1], fps=16, size=(48, 64), codec=sys.argv[2]) as writer:
        for seed in range(int(sys.argv[3])):
            writer.write(np.random.default_rng(seed).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8))
except StorageError as error:
    print(error)
else:
    sys.exit("not noticed")
"""


@pytest.mark.parametrize(("codec", "num"), [("h264", 40), ("ffv1", 40), ("ffv1", 5)])
def test_a_full_disk_is_noticed(codec: str, num: int, tmp_path: Path) -> None:
    path = tmp_path / f"a{CODECS[codec].suffix}"
    result = run_python(FULL_DISK, path, codec, num)
    assert result.returncode == 0, result.stderr
    assert str(path) in result.stdout
    assert not path.exists()


@pytest.mark.parametrize(
    ("given", "exact"),
    [
        (16, Fraction(16)),
        ("24000/1001", Fraction(24000, 1001)),
        (23.976, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (12.5, Fraction(25, 2)),
        (0.1, Fraction(1, 10)),
    ],
)
def test_fps(given: float | str, exact: Fraction) -> None:
    assert parse_fps(given) == exact


def test_b_frames_are_used(tmp_path: Path) -> None:
    assert inspect_video(write(tmp_path / "a.mp4", moving(12))).reorder_frames > 0
