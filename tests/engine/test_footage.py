"""Videos are read as they are, or said to be damaged; contact sheets."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from longtake.engine.footage import Frames, contact_sheet, probe, read_frames
from longtake.engine.video import join
from longtake.engine.video_codec import CODECS
from longtake.kernels.errors import ConfigError, StorageError
from tests.engine.small_videos import HEIGHT, WIDTH, decode, moving, payloads, write


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("joined", [False, True])
def test_a_cut_file_is_never_taken_for_whole(codec: str, joined: bool, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{CODECS[codec].suffix}", moving(20), codec)
    if joined:
        path = tmp_path / f"film{path.suffix}"
        join([tmp_path / f"a{path.suffix}"], path)
    data = path.read_bytes()
    last = max(start + size for start, size in payloads(path))
    for size in (0, 10, 100, len(data) // 2, last - 1000, last - 1):
        path.write_bytes(data[:size])
        with pytest.raises(StorageError):
            probe(path)
        with pytest.raises(StorageError):
            join([path], tmp_path / f"again{path.suffix}")


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_a_wiped_frame_is_found_when_decoding(codec: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving(12), codec)
    data = bytearray(path.read_bytes())
    start, size = payloads(path)[3]
    data[start + 8 : start + size] = bytes(size - 8)
    path.write_bytes(data)
    with pytest.raises(StorageError, match="damaged"):
        decode(path)


def test_not_a_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("hello")
    with pytest.raises(StorageError, match="no video"):
        probe(path)
    with pytest.raises(StorageError, match="no such video"):
        list(read_frames(tmp_path / "absent.mp4"))


def read_png(path: Path) -> Frames:
    with av.open(str(path)) as container:
        return np.asarray(next(container.decode(video=0)).to_ndarray(format="rgb24"), dtype=np.uint8)


def test_contact_sheet(tmp_path: Path) -> None:
    frames = moving(11)
    path = write(tmp_path / "a.mkv", frames, "ffv1")
    assert contact_sheet(path, tmp_path / "sheet.png", columns=2, every=4) == (2, 2)
    sheet = read_png(tmp_path / "sheet.png")
    assert sheet.shape == (2 * HEIGHT + 2, 2 * WIDTH + 2, 3)
    assert np.array_equal(sheet[:HEIGHT, :WIDTH], frames[0])
    assert np.array_equal(sheet[:HEIGHT, WIDTH + 2 :], frames[4])
    assert np.array_equal(sheet[HEIGHT + 2 :, :WIDTH], frames[8])
    assert contact_sheet(path, tmp_path / "small.png", columns=6, every=5, tile_width=32) == (1, 3)
    assert read_png(tmp_path / "small.png").shape == (24, 3 * 32 + 2 * 2, 3)
    with pytest.raises(ConfigError, match="at least 1"):
        contact_sheet(path, tmp_path / "none.png", every=0)
    assert not list(tmp_path.glob("*.partial"))
