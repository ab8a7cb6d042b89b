"""Videos are read as they are, or said to be damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from longtake.engine.footage import probe, read_frames
from longtake.engine.video import join
from longtake.engine.video_codec import CODECS
from longtake.kernels.errors import StorageError
from tests.engine.small_videos import decode, moving, payloads, write


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
