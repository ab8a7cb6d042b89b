"""The page about a film: all of it in one file, nothing of the film becomes markup, any state of a run has one."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import av
import pytest
import torch

from longtake.engine.footage import read_frames
from longtake.engine.video import SegmentWriter
from longtake.jobs import cli
from longtake.jobs.film import parse_film
from longtake.jobs.pictures import shot_pictures
from longtake.jobs.report import write_report
from longtake.jobs.status import ShotStatus, State, StatusFile
from longtake.jobs.svg import Series, plot, thinned

EVIL = '<script>alert("x")</script>'


def write_video(path: Path, num_frames: int = 40) -> None:
    """Frames that grow brighter."""
    writer = SegmentWriter(path, fps=8, size=(48, 64), codec="h264")
    for number in range(num_frames):
        writer.write(torch.full((1, 48, 64, 3), 5 * number, dtype=torch.uint8))
    writer.close()


def run_directory(tmp_path: Path) -> Path:
    shots = "".join(f'[[shot]]\nname = "{name}"\nduration = "5s"\nprompt = "p"\n' for name in ("a", "b"))
    film = parse_film(f"[film]\ntitle = '{EVIL}'\n{shots}")
    entries = {
        "a": ShotStatus(
            state=State.RUNNING, num_blocks=10, num_frames=80, blocks_done=5, frames_done=40, gpu_hours=0.5
        ),
        "b": ShotStatus(state=State.DEAD, num_blocks=10, num_frames=80, reason=EVIL),
    }
    StatusFile(tmp_path, film).update(entries)
    folder = tmp_path / "a"
    (folder / "segments").mkdir(parents=True)
    write_video(folder / "segments" / "00000.mp4")
    config = {
        "height": 48,
        "width": 64,
        "fps": 8,
        "seed": 1,
        "model": {"name": "tiny", "history": {}},
        "cache": {"codec": "int4"},
    }
    config |= {"history": {}, "beats": [{"at_s": 0.0, "prompt": EVIL}]}
    (folder / "config.json").write_text(json.dumps({"format": 1, "starts_from": None, "config": config}))
    tiers = {"device": {"used_bytes": 100, "budget_bytes": 200}, "disk": {"used_bytes": 100, "budget_bytes": None}}
    lines = [
        {
            "time": 5.0,
            "block": block,
            "seconds": 0.5,
            "frames": 8 * block,
            "stages_s": {"denoise": 0.4 * (1 + block % 3)},  # begun anew twice
            "memory": {"weights": 1 << 20},
            "tiers": tiers,
            "stalled_disk_s": 0.1 * block,
        }
        for block in range(1, 6)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_a_page_with_nothing_outside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run_directory(tmp_path)
    assert cli.run(["report", str(directory)]) == 0
    assert capsys.readouterr().out.strip() == str(directory / "report.html")
    text = (directory / "report.html").read_text()
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not attributes.keys() & {"href", "srcset", "onload"}
        assert str(attributes.get("src", "data:")).startswith("data:")
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text
    assert sum(tag == "img" for tag, _ in page.tags) == 12
    assert sum(tag == "svg" for tag, _ in page.tags) == 3, "what was not recorded has no plot"
    assert "tiny, 48x64 at 8 fps, seed 1, history in int4" in text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text)


def test_pictures_are_the_frames_that_they_say(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    write_video(folder / "a.mp4")
    frames = list(read_frames(folder / "a.mp4"))
    pictures = shot_pictures(folder, 4)
    assert [round(picture.time_s * 8) for picture in pictures] == [0, 13, 26, 39]
    for picture in pictures:
        data = base64.b64decode(picture.data_url.split(",")[1])
        with av.open(io.BytesIO(data), "r", format="mjpeg") as container:
            (shown,) = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
        assert abs(float(shown.mean()) - float(frames[round(picture.time_s * 8)].mean())) < 3
    assert len(shot_pictures(folder, 100)) == 40
    assert shot_pictures(tmp_path / "nowhere", 4) == []


def test_a_page_in_its_own_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = run_directory(tmp_path)
    status = directory / "status.json"
    status.write_text(status.read_text().replace('"title": "', '"title": "H\\u00e4fen \\u2013 '))
    asked: list[object] = []
    plain = Path.write_text

    def write_text(self: Path, text: str, encoding: str | None = None) -> int:
        asked.append(encoding)
        return plain(self, text, encoding=encoding)

    monkeypatch.setattr(Path, "write_text", write_text)
    write_report(directory, tmp_path / "page.html")
    assert asked == ["utf-8"], "as its head says, whatever the system's is"


def test_what_cannot_be_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", str(tmp_path)]) == 2
    assert "nothing was rendered here" in capsys.readouterr().err
    directory = run_directory(tmp_path)
    (directory / "a" / "segments" / "00000.mp4").write_bytes(b"no video")
    (directory / "a" / "config.json").unlink()
    write_report(directory, tmp_path / "page.html")
    assert "its config.json is not there" in (tmp_path / "page.html").read_text()
    assert cli.run(["report", str(directory), "--html", str(tmp_path / "no" / "page.html")]) == 1


def test_plots() -> None:
    spiky = [(float(x), 9.0 if x == 777 else 1.0) for x in range(5000)]
    assert len(thinned(spiky)) <= 500 and max(y for _, y in thinned(spiky)) == 9.0
    text = plot("t", [Series(name="<a>", points=[(1.0, 2.0)])], x_name="x", y_text=str)
    assert "&lt;a&gt;" in text and "<circle" in text
    assert "nothing was recorded" in plot("t", [], x_name="x", y_text=str)
    assert "none" in plot("t", [Series(name="a", points=[(1.0, 0.0)])], x_name="x", y_text=str)
    assert "none" in plot("t", [Series(name="a", points=[(1.0, -5.0)])], x_name="x", y_text=str)


@pytest.mark.parametrize("size", [300, 1000, 1023, 600 << 10, 1023 << 10, 5 << 20, 3 << 30])
def test_an_axis_of_bytes_ends_at_a_round_number(size: int) -> None:
    text = plot("t", [Series(name="a", points=[(1.0, size)])], x_name="x", y_text=repr, y_base=1024)
    top = max(float(label) for label in re.findall(r'text-anchor="end">([0-9.]+)</text>', text))
    unit = 1024.0 ** math.floor(math.log(size, 1024))
    assert size <= top <= 1.5 * size and (top / unit * 2).is_integer()


def test_columns_that_nothing_fills_are_left_out(tmp_path: Path) -> None:
    directory = run_directory(tmp_path)
    write_report(directory, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<th>device hours</th>" in text and "<th>starts</th>" not in text
    assert "goes on after</td>" not in text
    config = json.loads((directory / "a" / "config.json").read_text())
    config["config"] |= {"after": "z", "after_blocks": 3}
    (directory / "a" / "config.json").write_text(json.dumps(config))
    write_report(directory, tmp_path / "page.html")
    assert "z, with 3 blocks of it" in (tmp_path / "page.html").read_text()
