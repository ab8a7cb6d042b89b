"""Shots that stop, fail, fill the disk, and go on: the same bytes, no thread left, the first error told."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from longtake.engine import emitter as emitting
from longtake.engine.config import ShotConfig, Switch
from longtake.engine.latents import LatentLog
from longtake.engine.random_model import write_random_model
from longtake.engine.segments import Segments, segment_blocks
from longtake.engine.shot import BlockProgress, ShotRenderer, ShotResult
from longtake.engine.shotfolder import ShotFolder
from longtake.engine.timeline import Timeline
from longtake.engine.vae import StreamingDecoder
from longtake.engine.video import SegmentWriter
from longtake.engine.weights import read_spec
from longtake.jobs.film import parse_film
from longtake.jobs.recipe import Recipe
from longtake.jobs.resolve import resolve
from longtake.jobs.verify import verify
from longtake.kernels.errors import ConfigError, StorageError
from longtake.offload.errors import DiskFullError, LockedError, is_disk_full
from longtake.offload.run import committed_blocks
from longtake.offload.store import BlockStore

FILM = """\
[film]
model = "{model}"
[[shot]]
name = "a"
duration = "13s"
prompt = "p"
[[shot.beat]]
at = "5s"
prompt = "q"
[[shot]]
name = "b"
duration = "11s"
after = "a"
prompt = "r"
"""


def nobody() -> bool:
    return False


def ignore(progress: BlockProgress) -> None:
    pass


class Film:
    """Two shots of two segments each; `b` starts from `a`, whose second beat commits history anew."""

    def __init__(self, model: Path) -> None:
        film = parse_film(FILM.format(model=model))
        self.shots = dict(resolve(film, lambda name: read_spec(str(model))))
        first, second = self.shots["a"].beats
        beats = (first, dataclasses.replace(second, switch=Switch.RECACHE))  # some history is committed twice
        self.shots["a"] = dataclasses.replace(self.shots["a"], beats=beats)
        self.renderer = ShotRenderer()

    def render(
        self,
        name: str,
        out: Path,
        *,
        stop: Callable[[], bool] = nobody,
        progress: Callable[[BlockProgress], None] = ignore,
    ) -> ShotResult:
        (out / name).mkdir(exist_ok=True)
        Recipe(config=self.shots[name]).keep_in(out / name)
        return self.renderer(self.shots[name], out / name, "cpu", stop=stop, progress=progress)

    def stop_after(self, name: str, out: Path, num_blocks: int) -> ShotResult:
        """Render until the shot has so many blocks."""
        done = [0]

        def progress(report: BlockProgress) -> None:
            done[0] = report.block

        return self.render(name, out, stop=lambda: done[0] >= num_blocks, progress=progress)


def contents(folder: Path) -> dict[str, str]:
    """Hashes of what must be the same whatever happened in between."""
    paths = [path for part in ("segments", "kv.zarr", "latents.zarr") for path in (folder / part).rglob("*")]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
        if path.is_file()
    }


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Film:
    return Film(write_random_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def undisturbed(film: Film, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    for name in ("a", "b"):
        result = film.render(name, out)
        assert result.finished
        assert [path.name for path in result.segments] == ["00000.mp4", "00001.mp4"]
        assert set(result.segments) == set((out / name / "segments").iterdir())
    return out


@pytest.fixture
def out(undisturbed: Path, tmp_path: Path) -> Path:
    """A directory with shot `a` finished and `b` not begun."""
    subprocess.run(["cp", "-r", str(undisturbed / "a"), str(tmp_path / "a")], check=True)
    return tmp_path


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread for thread in set(threading.enumerate()) - before if "zarr" not in thread.name]
    assert not [thread for thread in left if not thread.name.startswith(("asyncio", "ThreadPool"))], left


def test_geometry(film: Film) -> None:
    for shot in film.shots.values():
        assert segment_blocks(shot) == 10
        assert 10 < shot.num_blocks < 20
    assert film.shots["b"].after_blocks == 2


@pytest.mark.parametrize("name", ["a", "b"])
def test_stopped_at_any_block(film: Film, undisturbed: Path, out: Path, name: str) -> None:
    """One run that stops after every block, so that each stop is resumed."""
    expected, folder = contents(undisturbed / name), out / ("again" if name == "a" else "")
    folder.mkdir(exist_ok=True)
    num_blocks = film.shots[name].num_blocks
    for block in range(1, num_blocks):
        assert not film.stop_after(name, folder, block).finished
    assert film.render(name, folder).finished
    assert contents(folder / name) == expected
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["block"] for line in lines] == list(range(1, num_blocks + 1))


def test_stopped_in_the_prefix(film: Film, undisturbed: Path, out: Path) -> None:
    for _ in range(3):
        asked = [0]

        def second_time(asked: list[int] = asked) -> bool:
            asked[0] += 1
            return asked[0] > 1

        assert not film.render("b", out, stop=second_time).finished
    assert film.render("b", out).finished
    assert contents(out / "b") == contents(undisturbed / "b")


def test_where_a_shot_goes_on_is_told(film: Film, out: Path) -> None:
    film.stop_after("b", out, 4)
    reports: list[BlockProgress] = []
    film.render("b", out, stop=lambda: len(reports) >= 2, progress=reports.append)
    assert [(report.block, report.seconds_block > 0) for report in reports] == [(4, False), (5, True)]
    assert reports[0].frames_done == 0  # of whole segments


def test_a_finished_shot_needs_no_model(film: Film, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = ShotRenderer()
    monkeypatch.setattr(renderer, "_load", None)
    result = renderer(film.shots["a"], out / "a", "cpu", stop=nobody, progress=ignore)
    assert result.finished
    assert len(result.segments) == 2


@pytest.mark.parametrize("damage", ["deleted", "damaged", "unlisted", "torn"])
@pytest.mark.parametrize("index", [0, 1])
def test_segments_are_made_again(film: Film, undisturbed: Path, out: Path, damage: str, index: int) -> None:
    path = out / "a" / "segments" / f"{index:05d}.mp4"
    match damage:
        case "deleted":
            path.unlink()
        case "damaged":
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        case "unlisted":
            (path.parent / "00007.mp4").write_bytes(b"left over")
            path.unlink()
        case "torn":
            path.rename(path.with_name(path.name + ".partial"))
    asked = [0]

    def once() -> bool:
        asked[0] += 1
        return asked[0] > 1

    film.render("a", out, stop=once)
    assert film.render("a", out).finished
    assert contents(out / "a") == contents(undisturbed / "a")
    assert not verify(out).damages


def test_killed_after_the_last_block(film: Film, undisturbed: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks are durable, the last segment is not there yet."""

    def interrupted(self: emitting.Emitter, *_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(emitting.Emitter, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            film.render("b", out)
    with ShotFolder(film.shots["b"], out / "b") as files:
        assert files.num_done == film.shots["b"].num_blocks
        assert not files.finished
    assert film.render("b", out).finished
    assert contents(out / "b") == contents(undisturbed / "b")


@pytest.mark.parametrize("where", ["decode", "segment", "latents", "rollout", "progress", "signal"])
def test_errors(film: Film, undisturbed: Path, out: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error comes out as it is, and the shot goes on afterwards."""

    class Boom(Exception):
        pass

    def fail_after(owner: type, method: str, count: int) -> None:
        plain, calls = getattr(owner, method), [0]

        def failing(*arguments: object, **options: object) -> object:
            calls[0] += 1
            if calls[0] > count:
                raise Boom(where)
            return plain(*arguments, **options)

        patched.setattr(owner, method, failing)

    def progress(report: BlockProgress) -> None:
        if where in ("progress", "signal") and report.block == 5:
            raise Boom(where)

    with monkeypatch.context() as patched:
        match where:
            case "decode":
                fail_after(StreamingDecoder, "decode", 4)
            case "segment":
                fail_after(SegmentWriter, "close", 0)
            case "latents":
                fail_after(LatentLog, "write", 4)
            case "rollout":
                fail_after(BlockStore, "write_chunk", 6)
        expected: type[BaseException] = StorageError if where == "rollout" else Boom
        with pytest.raises(expected, match=where if expected is Boom else "Boom"):
            film.render("b", out, progress=progress)
    if where == "signal":  # what was put is kept, though it was not decoded
        with ShotFolder(film.shots["b"], out / "b") as files:
            assert files.num_done == 5
    assert film.render("b", out).finished
    assert contents(out / "b") == contents(undisturbed / "b")


def test_a_second_process_is_refused(film: Film, out: Path) -> None:
    with (
        ShotFolder(film.shots["b"], out / "b"),
        pytest.raises(LockedError, match=rf"in use by process {os.getpid()} on "),
    ):
        film.render("b", out)


def test_another_configuration_is_refused(film: Film, out: Path) -> None:
    changed = dataclasses.replace(film.shots["a"], seed=99)
    before = contents(out / "a")
    with pytest.raises(ConfigError, match="another configuration"):
        film.renderer(changed, out / "a", "cpu", stop=nobody, progress=ignore)
    assert contents(out / "a") == before


def test_latents_of_a_shot_that_was_not_rendered(film: Film, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="starts from 'a', which is not rendered"):
        film.render("b", tmp_path)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("missing", [False, True])
def test_damaged_history_is_refused_with_the_mend(film: Film, undisturbed: Path, out: Path, missing: bool) -> None:
    film.stop_after("b", out, 6)
    chunk = next((out / "b" / "kv.zarr").glob("*/c.7.0.0.0"))  # entry 7 is block 5, which block 6 attends
    if missing:
        chunk.unlink()
    else:
        flip(chunk)
    with pytest.raises(StorageError) as caught:
        film.render("b", out)
    message = str(caught.value)
    latents = out / "b" / "latents.zarr" / "c.5.0.0.0.0"
    assert f"delete {latents} and run again to go on from that block" in message
    assert "block 7" in message and str(chunk) in message and "layer" in message and "head" in message
    (damage,) = verify(out).damages
    assert (damage.shot, damage.block, damage.file) == ("b", 7, str(chunk.relative_to(out)))
    assert damage.layers is not None and damage.heads is not None
    latents.unlink()
    assert film.render("b", out).finished
    assert contents(out / "b") == contents(undisturbed / "b")


def test_a_prefix_in_the_history_is_mended_anew_only(film: Film, out: Path) -> None:
    film.stop_after("b", out, 1)
    flip(next((out / "b" / "kv.zarr").glob("*/c.0.0.0.0")))
    with pytest.raises(StorageError, match=r"block 0, layer \d.*; render the shot anew with --fresh --shot b"):
        film.render("b", out)


def test_damaged_latents_are_refused_with_the_mend(film: Film, undisturbed: Path, out: Path) -> None:
    film.stop_after("b", out, 6)
    latents = out / "b" / "latents.zarr" / "c.3.0.0.0.0"
    flip(latents)
    with pytest.raises(StorageError, match=r"latents of a block are damaged.*delete that file.*block 3"):
        film.render("b", out)
    (damage,) = verify(out).damages
    assert (damage.shot, damage.block) == ("b", 3)
    latents.unlink()
    assert film.render("b", out).finished
    assert contents(out / "b") == contents(undisturbed / "b")


def test_damaged_latents_of_the_shot_before(film: Film, out: Path) -> None:
    last = LatentLog.existing(out / "a" / "latents.zarr")
    flip(last.chunk(len(last) - 1))
    with pytest.raises(StorageError, match="delete that file and the video of shot 'a' and run again"):
        film.render("b", out)


def test_metrics_after_a_kill(film: Film, out: Path) -> None:
    """A torn line, and a line of a block that was not durable, are gone; other lines stay as they are."""
    film.stop_after("b", out, 3)
    path = out / "b" / "metrics.jsonl"
    before = path.read_text()
    path.write_text(before + '{"block": 4, "x": 1}\n{"block": 5, "se')
    film.stop_after("b", out, 4)
    lines = path.read_text().splitlines(keepends=True)
    assert "".join(lines[:3]) == before
    assert [json.loads(line)["block"] for line in lines] == [1, 2, 3, 4]
    assert "x" not in json.loads(lines[3])


def test_latents_without_history_are_forgotten(film: Film, undisturbed: Path, out: Path) -> None:
    """What another device left beyond the committed blocks must not count when those are rendered again."""
    film.stop_after("b", out, 4)
    log = LatentLog.existing(out / "b" / "latents.zarr")
    log.write(4, log.read(0, 1))
    log.write(6, log.read(0, 1))
    with ShotFolder(film.shots["b"], out / "b") as files:
        assert files.num_done == 4
        assert files.latents.num_blocks_there == 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A folder with so many bytes of room."""
    mounted: list[Path] = []

    def mount(num_bytes: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        options = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(options, capture_output=True).returncode:
            pytest.skip("a small disk can be mounted by root only")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def num_committed(shot: ShotConfig, folder: Path) -> int:
    """Entries of the history that are journaled and whose latents are there: those with which a shot goes on."""
    latents = folder / "latents.zarr"
    if not (latents / "zarr.json").exists():
        return 0
    journaled = committed_blocks(folder, shot.model.transformer.num_heads)
    return min(journaled, Timeline(shot, 0).num_known(LatentLog.existing(latents).num_written()))


@pytest.mark.parametrize("num_kib", [40, 90, 130, 170, 230])
def test_a_full_disk(film: Film, undisturbed: Path, small_disk: Callable[[int], Path], num_kib: int) -> None:
    """Whatever hits the end of the disk first: nothing committed is lost, and it goes on when there is room."""
    disk = small_disk(num_kib << 10)
    with pytest.raises((DiskFullError, StorageError)) as caught:
        film.render("a", disk)
    assert is_disk_full(caught.value), repr(caught.value)
    committed = num_committed(film.shots["a"], disk / "a")
    for _ in range(2):  # again without room: the same, and still nothing is lost
        with pytest.raises((DiskFullError, StorageError)) as caught:
            film.render("a", disk)
        assert is_disk_full(caught.value), repr(caught.value)
        assert num_committed(film.shots["a"], disk / "a") >= committed
    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    assert film.render("a", disk).finished
    assert contents(disk / "a") == contents(undisturbed / "a")
    assert not [path for path in disk.rglob("*.partial") if ".prompts" not in path.parts]


def test_a_disk_that_fills_up_in_the_decoder_only(
    film: Film, undisturbed: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: SegmentWriter) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(SegmentWriter, "close", full)
        with pytest.raises(OSError, match="No space left"):
            film.render("b", out)
    assert film.render("b", out).finished
    assert contents(out / "b") == contents(undisturbed / "b")


def test_a_slow_decoder_holds_the_rollout_back(film: Film, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue is short: with every decode a tenth of a second, blocks run no more than three ahead."""
    plain = StreamingDecoder.decode

    def slow(self: StreamingDecoder, latents_CFHW: Tensor) -> Tensor:
        time.sleep(0.1)
        return plain(self, latents_CFHW)

    monkeypatch.setattr(StreamingDecoder, "decode", slow)
    shot: ShotConfig = film.shots["b"]
    ahead: list[int] = []

    def progress(report: BlockProgress) -> None:
        ahead.append(report.block - report.frames_done // (shot.model.block_frames * shot.model.temporal_stride))

    film.render("b", out, stop=lambda: len(ahead) >= 8, progress=progress)
    assert max(ahead) <= emitting._QUEUE_BLOCKS + 2


def test_segments_are_journaled_when_their_blocks_are_durable(film: Film, out: Path) -> None:
    film.stop_after("b", out, 11)
    with ShotFolder(film.shots["b"], out / "b") as files:
        assert [record.index for record in files.run.segments] == [0] or not files.run.segments
        assert all(record.num_blocks <= files.run.num_blocks for record in files.run.segments)
        assert isinstance(files.segments, Segments)
