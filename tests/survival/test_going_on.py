"""``longtake render`` run again, and ``longtake verify``: when all is finished, when files are gone, bad, or held."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from longtake.engine.latents import LatentLog
from longtake.engine.random_model import write_random_model
from longtake.engine.shot import ShotRenderer
from longtake.jobs import cli
from longtake.jobs.status import StatusFile
from longtake.kernels.errors import StorageError
from longtake.offload.lock import FolderLock
from tests.survival.kills import FILM, contents

BLOCKS = {"arrival": 4, "quay": 2}


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("film")
    model = write_random_model(folder / "model")
    text = FILM.format(model=model).replace('"24s"', '"3s"').replace('"15s"', '"2s"').replace('"9s"', '"1s"')
    (folder / "film.toml").write_text(text)
    return folder / "film.toml"


def render(film: Path, out: Path, *options: str) -> int:
    return cli.run(["render", str(film), "--out", str(out), "--device", "cpu", *options])


@pytest.fixture(scope="module")
def undisturbed(film: Path) -> Path:
    out = film.parent / "undisturbed"
    assert render(film, out) == 0
    return out


@pytest.fixture
def out(undisturbed: Path, tmp_path: Path) -> Path:
    """A finished film's directory."""
    shutil.copytree(undisturbed, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def engine_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShotRenderer, "_load", None)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.usefixtures("engine_is_not_needed")
@pytest.mark.parametrize("deleted", [(), ("film.mp4",), ("arrival/arrival.mp4", "film.mp4"), ("status.json",)])
def test_a_finished_film(film: Path, undisturbed: Path, out: Path, deleted: tuple[str, ...]) -> None:
    for name in deleted:
        (out / name).unlink()
    assert render(film, out) == 0
    assert contents(out) == contents(undisturbed)
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["video"]) == ("SUCCEEDED", "film.mp4")


@pytest.mark.parametrize("damaged", [False, True])
def test_a_segment_is_made_again(
    film: Path, undisturbed: Path, out: Path, damaged: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    segment = out / "arrival" / "segments" / "00000.mp4"
    if damaged:
        flip(segment)
    else:
        segment.unlink()
    assert cli.run(["verify", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("arrival/segments/00000.mp4: ")
    assert "delete the shot's video and render again" in captured.err
    (out / "arrival" / "arrival.mp4").unlink()
    assert render(film, out) == 0
    assert contents(out) == contents(undisturbed)


def test_verify(undisturbed: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", str(undisturbed)]) == 0
    blocks = sum(BLOCKS.values())
    assert f"2 shots, {blocks + 2} blocks of history, {blocks} of latents, 2 segments: all whole" in (
        capsys.readouterr().out
    )
    flip(next(out.glob("quay/kv.zarr/*/c.3.0.0.0")))
    (out / "arrival" / "latents.zarr" / "c.1.0.0.0.0").unlink()
    flip(out / "quay" / "journal")
    (out / "film.mp4").write_bytes(b"")
    (out / "arrival" / "config.json").write_text("{")
    assert cli.run(["verify", str(out), "--json", str(out / "verdict.json")]) == 1
    verdict = json.loads((out / "verdict.json").read_text())
    assert not verdict["whole"]
    files = [damage["file"] for damage in verdict["damages"]]
    for name in ("arrival/config.json", "arrival/latents.zarr/c.1.0.0.0.0", "quay/journal", "film.mp4"):
        assert name in files


def test_verify_names_the_place(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chunk = next(out.glob("quay/kv.zarr/*/c.3.0.0.0"))
    flip(chunk)
    assert cli.run(["verify", str(out), "--json", "-"]) == 1
    captured = capsys.readouterr()
    (damage,) = json.loads(captured.out)["damages"]
    assert (damage["shot"], damage["block"], damage["file"]) == ("quay", 3, str(chunk.relative_to(out)))
    assert damage["layers"][0] in (0, 1) and damage["heads"][0] in (0, 1)
    assert captured.err.splitlines()[-1].startswith("longtake: 1 file of ")


def test_a_shot_killed_as_it_began_is_no_damage(film: Path, undisturbed: Path, out: Path) -> None:
    """Its folders are there, and what should be in them is not yet."""
    shot = out / "quay"
    for name in ("kv.zarr", "segments", "latents.zarr"):
        shutil.rmtree(shot / name)
    for name in ("journal", "metrics.jsonl", "quay.mp4", "../film.mp4"):
        (shot / name).unlink()
    (shot / "latents.zarr").mkdir()
    (shot / "latents.zarr" / "zarr.json.partial").write_bytes(b"{")
    assert cli.run(["verify", str(out)]) == 0
    assert render(film, out) == 0
    assert contents(out) == contents(undisturbed)
    (shot / "latents.zarr" / "zarr.json").unlink()
    assert cli.run(["verify", str(out)]) == 1, "with blocks of latents it is"


@pytest.mark.parametrize("name", ["nowhere", "film.toml", "."])
def test_verify_of_no_film(film: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", str(film if name == "film.toml" else tmp_path / name)]) == 2
    assert "name the --out of a render" in error_line(capsys)


def test_damaged_latents_and_the_way_on(
    film: Path, undisturbed: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the messages say works: delete what is named, run again."""
    latents = LatentLog.existing(out / "arrival" / "latents.zarr").chunk(2)
    flip(latents)
    shutil.rmtree(out / "arrival" / "segments")
    (out / "arrival" / "arrival.mp4").unlink()
    assert render(film, out) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "latents of a block are damaged" in line and str(latents) in line and "delete that file" in line
    assert json.loads((out / "status.json").read_text())["shots"]["arrival"]["state"] == "DEAD"
    latents.unlink()
    assert render(film, out) == 0
    assert contents(out) == contents(undisturbed)


def test_a_second_process(film: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (out / "status.json").read_text()
    with_lock = FolderLock(out / ".quay.lock")
    try:
        for options in ((), ("--fresh",), ("--shot", "quay")):
            assert render(film, out, *options) == 1
            assert f"shot 'quay': the folder is in use by process {os.getpid()} on " in error_line(capsys)
        assert (out / "status.json").read_text() == before
        assert render(film, out, "--shot", "arrival") == 0
    finally:
        with_lock.close()
    engines = FolderLock(out / "quay" / "lock")  # another program of ours holds the folder
    (out / "quay" / "quay.mp4").unlink()
    try:
        assert render(film, out) == 1
    finally:
        engines.close()
    assert render(film, out) == 0


def test_fresh_that_was_killed_on_the_way(
    film: Path, undisturbed: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shutil.rmtree

    def killed(path: Path, **options: bool) -> None:
        if not options:
            (path / "journal").unlink()
            raise KeyboardInterrupt
        plain(path, ignore_errors=True)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        assert render(film, out, "--fresh") == 3
    assert (out / ".arrival.discarded").exists()
    assert render(film, out) == 0
    assert contents(out) == contents(undisturbed)
    assert not (out / ".arrival.discarded").exists()


def test_full_disks_are_interruptions(
    film: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not of the engine's making: status and recipe, which say so in their own words."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def no_room(*arguments: object) -> None:
        raise StorageError("cannot write the status") from full

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(StatusFile, "update", no_room)
        assert render(film, out) == 3
        assert "no room on the disk, make some and run the same command again" in error_line(capsys)

    def bare(*arguments: object, **options: object) -> None:
        raise full

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", bare)
        assert render(film, out) == 3
        assert "no room on the disk" in error_line(capsys)
    with monkeypatch.context() as patched:
        patched.setattr(ShotRenderer, "_load", bare)
        assert render(film, out) == 3
    status = json.loads((out / "status.json").read_text())
    assert status["shots"]["arrival"]["state"] == "PAUSED"
    assert "No space left" in status["shots"]["arrival"]["reason"]
    assert render(film, out) == 0
    assert contents(out) == contents(undisturbed)


def test_a_full_disk_budget(film: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The film may be changed in its budgets only, and goes on."""
    small, out = film.with_name("small.toml"), tmp_path / "out"
    small.write_text(film.read_text().replace("[film.cache]", '[film.cache]\ndisk = "4KiB"'))
    for _ in range(2):
        assert render(small, out) == 3
        assert "the disk budget of 4,096 bytes is full" in error_line(capsys)
    assert json.loads((out / "status.json").read_text())["shots"]["arrival"]["state"] == "PAUSED"
    assert len(list(out.glob("arrival/latents.zarr/c.*"))) >= 1
    assert render(film, out) == 0
    found, expected = contents(out), contents(undisturbed)
    assert {name for name in expected if found[name] != expected[name]} == {"arrival/config.json"}


def test_status_right_after_a_start(film: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run did is known before the first new block is rendered."""
    seen: list[dict[str, int]] = []

    def look(*arguments: object) -> None:
        entries = json.loads((out / "status.json").read_text())["shots"]
        seen.append({name: entry["blocks_done"] for name, entry in entries.items()})
        raise KeyboardInterrupt

    (out / "arrival" / "arrival.mp4").unlink()
    (out / "arrival" / "segments" / "00000.mp4").unlink()
    monkeypatch.setattr(ShotRenderer, "_load", look)
    assert render(film, out) == 3
    assert seen == [BLOCKS]


def test_another_version_of_the_settings(film: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = film.with_name("changed.toml")
    changed.write_text(film.read_text().replace("seed = 3", "seed = 4"))
    assert render(changed, out) == 2
    assert "seed: 3 -> 4" in error_line(capsys)
    path = out / "arrival" / "config.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 0'))
    assert render(film, out) == 2
    assert "are of format 0, this longtake reads 1; render with --fresh" in error_line(capsys)
