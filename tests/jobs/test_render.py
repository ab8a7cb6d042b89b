from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from longtake.engine.config import ModelSpec, ShotConfig
from longtake.jobs import render as rendering
from longtake.jobs.film import parse_film
from longtake.jobs.progress import Report
from longtake.jobs.render import BlockProgress, FilmRenderer, RenderJob, ShotResult, check_device, make_directory
from longtake.jobs.resolve import resolve
from longtake.jobs.status import StatusFile
from longtake.kernels.errors import ConfigError, StorageError

FILM = """\
[[shot]]
name = "b"
duration = "1s"
prompt = "q"
after = "a"
[[shot]]
name = "a"
duration = "3s"
prompt = "p"
"""


@dataclass(frozen=True)
class FakeProgress:
    block: int
    num_blocks: int
    frames_done: int
    num_frames: int
    seconds_block: float = 0.5
    device_cache_bytes: int = 1000


@dataclass(frozen=True)
class FakeResult:
    finished: bool
    segments: Sequence[Path]


@dataclass
class FakeEngine:
    """Renders a shot as one text file a block; goes on where it left off; fails on demand."""

    fail: dict[str, BaseException] = field(default_factory=dict)
    rendered: list[tuple[str, int]] = field(default_factory=list)
    devices: set[str] = field(default_factory=set)

    def __call__(
        self,
        shot: ShotConfig,
        folder: Path,
        device: str,
        /,
        *,
        stop: Callable[[], bool],
        progress: Callable[[BlockProgress], None],
    ) -> ShotResult:
        self.devices.add(device)
        segments = folder / "segments"
        segments.mkdir(exist_ok=True)
        if shot.after is not None:
            assert (folder.parent / shot.after / "segments" / "0.txt").exists()
        for block in range(len(list(segments.iterdir())), shot.num_blocks):
            if stop():
                return FakeResult(False, ())
            if shot.name in self.fail and block == 1:
                raise self.fail[shot.name]
            (segments / f"{block}.txt").write_text(f"{shot.name}{block} ")
            self.rendered.append((shot.name, block))
            progress(FakeProgress(block + 1, shot.num_blocks, min(shot.num_frames, 9 + 12 * block), shot.num_frames))
        return FakeResult(True, [segments / f"{block}.txt" for block in range(shot.num_blocks)])


def join(segments: Sequence[Path], out: Path) -> None:
    out.write_text("".join(path.read_text() for path in segments))


@dataclass
class Recorder:
    """A display that remembers."""

    reports: list[Report] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    done: list[tuple[str, int]] = field(default_factory=list)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def report(self, report: Report) -> None:
        self.reports.append(report)

    def shot_done(self, shot: str, film_frames_done: int, video: Path) -> None:
        self.done.append((shot, film_frames_done))

    def note(self, text: str) -> None:
        self.notes.append(text)


def job(spec: ModelSpec, directory: Path, text: str = FILM, **options: Any) -> RenderJob:
    film = parse_film(text)
    return RenderJob(film=film, configs=resolve(film, lambda name: spec), directory=directory, device="cpu", **options)


def run(work: RenderJob, engine: FakeEngine, display: Recorder, stop: Callable[[], bool] = lambda: False) -> bool:
    return FilmRenderer(work, render_shot=engine, join=join, display=display, stop=stop).run()


def status(directory: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((directory / "status.json").read_text())
    return data


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def display() -> Recorder:
    return Recorder()


def test_a_film_in_the_order_of_after_joined_in_its_own(
    spec: ModelSpec, tmp_path: Path, engine: FakeEngine, display: Recorder
) -> None:
    assert run(job(spec, tmp_path), engine, display)
    assert engine.rendered == [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("a", 4), ("b", 0), ("b", 1)]
    assert (tmp_path / "a" / "a.mp4").read_text() == "a0 a1 a2 a3 a4 "
    assert (tmp_path / "film.mp4").read_text() == "b0 b1 a0 a1 a2 a3 a4 "
    assert display.notes == [str(tmp_path / "film.mp4")]
    assert display.done == [("a", 57), ("b", 73)]
    first = display.reports[0]
    assert (first.shot, first.blocks_done, first.num_blocks, first.frames_done, first.num_frames) == ("a", 1, 5, 9, 57)
    assert first.frames_per_s == pytest.approx(12 / 0.5)
    assert first.shot_eta_s == pytest.approx(48 / 24)
    assert first.film_eta_s == pytest.approx((48 + 16) / 24)
    assert display.reports[-1].film_frames_done == 57 + 16


def test_status_of_a_finished_film(spec: ModelSpec, tmp_path: Path, engine: FakeEngine, display: Recorder) -> None:
    run(job(spec, tmp_path), engine, display)
    data = status(tmp_path)
    assert (data["state"], data["video"], list(data["shots"])) == ("SUCCEEDED", "film.mp4", ["b", "a"])
    shot = data["shots"]["a"]
    assert (shot["state"], shot["blocks_done"], shot["frames_done"], shot["video"]) == ("SUCCEEDED", 5, 57, "a/a.mp4")
    assert not list(tmp_path.glob("*.partial"))


def test_stop_and_go_on(
    spec: ModelSpec, tmp_path: Path, engine: FakeEngine, display: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "STATUS_INTERVAL_S", 0.0)
    work = job(spec, tmp_path)
    assert not run(work, engine, display, stop=lambda: len(engine.rendered) >= 2)
    data = status(tmp_path)
    assert data["state"] == "PAUSED"
    assert (data["shots"]["a"]["state"], data["shots"]["b"]["state"]) == ("PAUSED", "DEPEND")
    assert data["shots"]["a"]["frames_per_s"] is data["shots"]["a"]["eta_s"] is None, "it is not being rendered"
    assert not (tmp_path / "film.mp4").exists()
    assert run(work, engine, display)
    assert engine.rendered == [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("a", 4), ("b", 0), ("b", 1)]
    assert status(tmp_path)["state"] == "SUCCEEDED"


def test_a_finished_shot_is_not_rendered_again(
    spec: ModelSpec, tmp_path: Path, engine: FakeEngine, display: Recorder
) -> None:
    run(job(spec, tmp_path), engine, display)
    engine.fail = {"a": AssertionError("rendered again"), "b": AssertionError("rendered again")}
    assert run(job(spec, tmp_path), engine, display)
    assert len(engine.rendered) == 7


def test_one_shot_and_those_before_it(spec: ModelSpec, tmp_path: Path, engine: FakeEngine, display: Recorder) -> None:
    text = FILM + FILM.replace('name = "b"', 'name = "c"').split('[[shot]]\nname = "a"')[0]
    assert run(job(spec, tmp_path, text, only="c"), engine, display)
    assert {name for name, _ in engine.rendered} == {"a", "c"}
    assert display.notes == ["film.mp4 waits for: b"]
    assert list(status(tmp_path)["shots"]) == ["a", "c"]
    assert run(job(spec, tmp_path, text, only="b"), engine, display)
    assert list(status(tmp_path)["shots"]) == ["b", "a", "c"]
    assert (tmp_path / "film.mp4").exists()


def test_fresh(spec: ModelSpec, tmp_path: Path, engine: FakeEngine, display: Recorder) -> None:
    run(job(spec, tmp_path), engine, display)
    engine.rendered.clear()
    assert run(job(spec, tmp_path, only="b", fresh=True), engine, display)
    assert engine.rendered == [("b", 0), ("b", 1)]
    engine.rendered.clear()
    assert run(job(spec, tmp_path, fresh=True), engine, display)
    assert len(engine.rendered) == 7


def test_fresh_removes_only_what_a_render_made(
    spec: ModelSpec, tmp_path: Path, engine: FakeEngine, display: Recorder
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is no shot's directory \(no config\.json\); remove it by hand"):
        run(job(spec, tmp_path, fresh=True), engine, display)
    assert (tmp_path / "a" / "thesis.txt").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (tmp_path / "b").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is no shot's directory"):
        run(job(spec, tmp_path, only="b", fresh=True), engine, display)
    assert (tmp_path / "elsewhere" / "config.json").exists()


def test_a_changed_film_is_refused_with_the_difference(
    spec: ModelSpec, tmp_path: Path, engine: FakeEngine, display: Recorder
) -> None:
    run(job(spec, tmp_path), engine, display)
    changed = "[film]\nseed = 3\n" + FILM
    with pytest.raises(ConfigError, match=r"rendered from another film \(seed: 0 -> 3\); undo .* or add --fresh"):
        run(job(spec, tmp_path, changed), engine, display)
    assert status(tmp_path)["shots"]["a"]["state"] == "PAUSED"
    assert run(job(spec, tmp_path, changed, fresh=True), engine, display)
    assert run(job(spec, tmp_path, "# a comment\n[film]\ncache.device = '1GiB'\n" + changed[7:]), engine, display)


def test_a_changed_shot_refuses_the_one_after_it(
    spec: ModelSpec, tmp_path: Path, engine: FakeEngine, display: Recorder
) -> None:
    run(job(spec, tmp_path), engine, display)
    changed = FILM.replace('"p"', '"another"')
    with pytest.raises(ConfigError, match=r'beats\[0\]\.prompt: "p" -> "another"'):
        run(job(spec, tmp_path, changed, only="a"), engine, display)
    assert run(job(spec, tmp_path, changed, only="a", fresh=True), engine, display)
    assert display.notes[-1] == "film.mp4 waits for: b"
    assert not (tmp_path / "film.mp4").exists()
    with pytest.raises(ConfigError, match="the shot that it starts from changed"):
        run(job(spec, tmp_path, changed), engine, display)
    assert run(job(spec, tmp_path, changed, only="b", fresh=True), engine, display)
    assert (tmp_path / "film.mp4").exists()


def test_a_failing_shot_is_dead_and_says_why(
    spec: ModelSpec, tmp_path: Path, engine: FakeEngine, display: Recorder
) -> None:
    engine.fail = {"a": StorageError("no\nroom")}
    with pytest.raises(StorageError):
        run(job(spec, tmp_path), engine, display)
    shot = status(tmp_path)["shots"]["a"]
    assert (shot["state"], shot["reason"]) == ("DEAD", "no\\nroom")
    assert status(tmp_path)["state"] == "DEAD"
    engine.fail = {"a": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(job(spec, tmp_path), engine, display)
    assert status(tmp_path)["shots"]["a"]["state"] == "PAUSED"
    engine.fail = {}
    assert run(job(spec, tmp_path), engine, display)
    assert status(tmp_path)["shots"]["a"]["reason"] is None


def test_shots_of_different_size_are_not_joined(
    spec: ModelSpec, tmp_path: Path, engine: FakeEngine, display: Recorder
) -> None:
    text = FILM.replace('after = "a"', "size = [64, 64]")
    assert run(job(spec, tmp_path, text), engine, display)
    assert not (tmp_path / "film.mp4").exists()
    assert display.notes == ["no film.mp4: the shots differ in size or frame rate; each has its own video"]


def test_directories_that_cannot_be_written(tmp_path: Path) -> None:
    assert make_directory(tmp_path / "new" / "deep").is_dir()
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/longtake")):
        with pytest.raises(ConfigError, match=r"cannot be written .*; name a directory that can"):
            make_directory(bad)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_device("cpu") == "cpu"
    assert check_device(None) == "cpu"
    for bad in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=rf"--device {bad}: no CUDA device is usable here .*; write --device cpu"):
            check_device(bad)
    for bad in ("gpu", "cuda:", "cuda:x", "", "cpu:0"):
        with pytest.raises(ConfigError, match="unknown device; write cpu, cuda or cuda:N"):
            check_device(bad)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device(None) == "cuda"
    assert check_device("cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match="this machine has 2 CUDA devices"):
        check_device("cuda:2")


def test_status_is_not_written_for_every_block(
    spec: ModelSpec, tmp_path: Path, engine: FakeEngine, display: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = []
    monkeypatch.setattr(StatusFile, "update", lambda self, shots: writes.append(dict(shots)))
    monkeypatch.setattr(rendering, "STATUS_INTERVAL_S", 1e9)
    run(job(spec, tmp_path), engine, display)
    assert len(writes) == 6  # all waiting; each shot running, done; the film
    monkeypatch.setattr(rendering, "STATUS_INTERVAL_S", 0.0)
    writes.clear()
    run(job(spec, tmp_path, fresh=True), engine, display)
    assert len(writes) == 6 + 7
