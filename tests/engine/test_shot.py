"""Shots that stop, fail and go on: the same bytes, no thread left, the first error told."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from torch import Tensor

from longtake.engine import emitter as emitting
from longtake.engine.config import ShotConfig
from longtake.engine.latents import LatentLog
from longtake.engine.segments import Segments, segment_blocks
from longtake.engine.shot import BlockProgress, ShotRenderer
from longtake.engine.shotfolder import ShotFolder
from longtake.engine.vae import StreamingDecoder
from longtake.engine.video import SegmentWriter
from longtake.jobs.verify import verify
from longtake.kernels.errors import StorageError
from longtake.offload.store import BlockStore
from tests.engine.small_film import Film, contents, ignore, nobody

pytestmark = pytest.mark.usefixtures("no_thread_left")


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
