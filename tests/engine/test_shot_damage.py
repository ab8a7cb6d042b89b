"""Shots whose folders were damaged, belong to another film or fill the disk: refused with the mend, nothing lost."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longtake.engine.config import ShotConfig
from longtake.engine.latents import LatentLog
from longtake.engine.shotfolder import ShotFolder
from longtake.engine.timeline import Timeline
from longtake.engine.video import SegmentWriter
from longtake.jobs.verify import verify
from longtake.kernels.errors import ConfigError, StorageError
from longtake.offload.errors import DiskFullError, LockedError, is_disk_full
from longtake.offload.run import committed_blocks
from tests.engine.small_film import Film, contents, ignore, nobody

pytestmark = pytest.mark.usefixtures("no_thread_left")


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
