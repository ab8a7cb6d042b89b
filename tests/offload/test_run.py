"""A shot's folder: reopened after a crash, by another gang, by a rival; and verified."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from longtake.kernels.errors import ConfigError, LongtakeError, StorageError
from longtake.offload.cache import KVCache
from longtake.offload.errors import FencedError, LockedError
from longtake.offload.files import Bytes, as_bytes, crc32c
from longtake.offload.journal import replay
from longtake.offload.records import SegmentWritten, history
from longtake.offload.run import RunDirectory
from longtake.offload.verify import verify
from tests.offload.faults import FaultyOps, Unsynced, flip_bit
from tests.offload.payloads import SHAPE, check_passes, open_run, pages_on_host
from tests.offload.runs import BUDGET, checksums, gang, rollout, write


class Counting(FaultyOps):
    """Knows what is open, and fails at the call of that number.

    Args:
        fail_at: the first is 0; -1: none.
    """

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.fail_at, self.num_calls, self.still_open = fail_at, 0, set[int]()

    def _called(self) -> None:
        self.num_calls += 1
        if self.num_calls == self.fail_at + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def open(self, path: Path, flags: int) -> int:
        self._called()
        fd = super().open(path, flags)
        self.still_open.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self.still_open.remove(fd)
        super().close(fd)

    def write(self, fd: int, buffers: Sequence[Bytes]) -> int:
        self._called()
        return super().write(fd, buffers)

    def fsync(self, fd: int) -> None:
        self._called()
        super().fsync(fd)

    def replace(self, source: Path, target: Path) -> None:
        self._called()
        super().replace(source, target)

    def unlink(self, path: Path) -> None:
        self._called()
        super().unlink(path)


def test_goes_on_where_it_ended(tmp_path: Path) -> None:
    rollout(tmp_path, 3)
    rollout(tmp_path, 5)
    run = open_run(tmp_path)
    assert run.num_blocks == 5 and replay(tmp_path / "journal").epoch == 3
    cache = KVCache(shape=SHAPE, device="cpu", budget=BUDGET, run=run)
    assert cache.num_committed == cache.durable_blocks == 5
    check_passes(cache, (4, 0, 2))
    check_passes(cache, range(5))
    cache.close()
    run.close()
    assert verify(tmp_path) == []


def test_crash_before_the_record_leaves_an_orphan_that_is_removed(tmp_path: Path) -> None:
    rollout(tmp_path, 2)
    run = open_run(tmp_path)
    for chunk in run.store.chunks:
        run.store.write_chunk(2, chunk, pages_on_host(2))
    orphans = [run.store.path(2, chunk) for chunk in run.store.chunks]
    partial = orphans[0].with_name("c.3.0.0.0.partial")
    partial.write_bytes(b"half")
    run.close(orderly=False)
    assert verify(tmp_path) == []
    run = open_run(tmp_path)
    assert run.num_blocks == 2
    assert sorted(run.orphans) == sorted([*orphans, partial])
    assert not any(path.exists() for path in run.orphans)
    run.close()


def test_torn_journal_tail_loses_only_the_last_block(tmp_path: Path) -> None:
    rollout(tmp_path, 3)
    journal = tmp_path / "journal"
    records = replay(journal).records
    journal.write_bytes(journal.read_bytes()[: -len(b"anything") - 60])
    survivors = history(replay(journal).records).num_blocks
    assert survivors in (2, 3) and len(replay(journal).records) < len(records)
    rollout(tmp_path, 4)
    assert verify(tmp_path) == []


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    rollout(tmp_path, 2)
    before = (tmp_path / "journal").read_bytes()
    with pytest.raises(ConfigError, match="another configuration"):
        RunDirectory(tmp_path, shape=SHAPE, config_hash="d")
    assert (tmp_path / "journal").read_bytes() == before


def test_a_second_process_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    write(run, 0)
    before = (tmp_path / "journal").read_bytes()
    with pytest.raises(LockedError, match="in use by process"):
        RunDirectory(tmp_path, shape=SHAPE, config_hash="c")
    assert (tmp_path / "journal").read_bytes() == before
    run.close()


def test_a_writer_that_lost_its_lock_is_fenced_out(tmp_path: Path) -> None:
    old = open_run(tmp_path)
    write(old, 0)
    for lock in old._locks:
        lock.close()  # as when the lease of a machine ends while it still runs
    new = open_run(tmp_path)
    with pytest.raises(FencedError):
        write(old, 1)
    write(new, 1)
    old.close(orderly=False)
    new.close()
    assert history(replay(tmp_path / "journal").records).num_blocks == 2


def test_closing_on_a_bad_disk_leaves_nothing_open(tmp_path: Path) -> None:
    ops = Counting()
    run = open_run(tmp_path, ops)
    ops.fail_fsync = True
    with pytest.raises(StorageError, match="forcing the journal"):
        run.close()
    assert not ops.still_open
    open_run(tmp_path).close()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_an_opening_that_fails_anywhere_leaves_nothing_open(tmp_path: Path, num_ranks: int) -> None:
    """At each of its system calls; afterwards all that was committed is there."""
    for fail_at in range(1000):
        path = tmp_path / str(fail_at)
        shapes = [replace(SHAPE, num_heads=1, first_head=rank, total_heads=num_ranks) for rank in range(num_ranks)]
        for rank, shape in enumerate(shapes):
            run = RunDirectory(path, shape=shape, config_hash="c", rank=rank, num_ranks=num_ranks, ops=Unsynced())
            for block in range(1 + rank):  # so that some are to be rolled back
                write(run, block)
            run.close(orderly=False)
        ops, alone = Counting(fail_at=fail_at), replace(SHAPE, num_heads=num_ranks)
        try:
            RunDirectory(path, shape=alone, config_hash="c", ops=ops).close(orderly=False)
        except LongtakeError as error:
            assert "Input/output error" in str(error)
        else:
            assert 5 < ops.num_calls <= fail_at
            break
        assert not ops.still_open
        run = RunDirectory(path, shape=alone, config_hash="c", ops=Unsynced())
        assert run.num_blocks == 1
        run.close(orderly=False)
        assert verify(path) == []


def test_segments_follow_the_blocks(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    write(run, 0)
    video = b"segment of video"
    (tmp_path / "0.mp4").write_bytes(video)
    run.note_segment(
        SegmentWritten(index=0, path="0.mp4", checksum=crc32c(as_bytes(video)), num_blocks=1, num_frames=9)
    )
    run.close(orderly=False)
    run = open_run(tmp_path)
    assert [kept.num_frames for kept in run.segments] == [9]
    run.close()
    assert verify(tmp_path) == []
    (tmp_path / "0.mp4").write_bytes(video[:-1])
    assert len(verify(tmp_path)) == 1
    (tmp_path / "0.mp4").unlink()
    assert all("missing" in str(error) for error in verify(tmp_path))


@pytest.mark.parametrize(("rows", "most"), [((), 60), ((1, 4, 2), 8 << 20), ((1, 4, 3), 60)])
def test_gangs_of_other_sizes_go_on_from_the_same_bytes(
    tmp_path: Path, rows: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of one row or of several, and chunks that begin and end within a layer."""
    monkeypatch.setattr("longtake.offload.layout.MAX_CHUNK_BYTES", most)
    done = 0
    for num_ranks in (4, 2, 1, 4, 2):
        ranks = gang(tmp_path, num_ranks, rows)
        assert {run.num_blocks for run in ranks} == {done}
        for run in ranks:
            for block in range(done):
                assert np.array_equal(run.checksums_RH(block), checksums(run.shape, block))
                written = pages_on_host(block, run.shape)
                out, page_by_page = ([np.empty_like(page_HP) for page_HP in written] for _ in range(2))
                for chunk in run.store.chunks:
                    run.store.read_chunk(block, chunk, out, run.checksums_RH(block))
                for layer, page_HP in enumerate(page_by_page):
                    run.store.read_page(block, layer, page_HP, run.checksums_RH(block))
                for found in (out, page_by_page):
                    assert all(np.array_equal(*pair) for pair in zip(found, written, strict=True))
        for run in ranks:
            for block in range(done, done + 2):
                write(run, block)
            if run.rank == 0 and num_ranks > 1:
                write(run, done + 2)  # a rank that was ahead when the gang died
            run.close(orderly=False)
        done += 2
        assert verify(tmp_path) == []


def test_ranks_that_saw_different_journals_agree_on_the_minimum(tmp_path: Path) -> None:
    ranks = gang(tmp_path, 2)
    for run, count in zip(ranks, (3, 1), strict=True):
        for block in range(count):
            write(run, block)
        run.close(orderly=False)
    ranks = gang(tmp_path, 2)
    assert [run.num_blocks for run in ranks] == [1, 1]
    assert len(ranks[0].orphans) == 2 * 2
    for run in ranks:
        write(run, 1)
        run.close()
    assert verify(tmp_path) == []
    assert [run.num_blocks for run in gang(tmp_path, 2)] == [2, 2]


def test_verify_finds_every_one_of_many_damages(tmp_path: Path) -> None:
    rollout(tmp_path, 12)
    assert verify(tmp_path) == []
    run = open_run(tmp_path)
    paths = [run.store.path(block, chunk) for block in range(12) for chunk in run.store.chunks]
    run.close()
    chooser = random.Random(3)
    whole = {path: path.read_bytes() for path in paths}
    for _ in range(15):
        bad = chooser.sample(paths, chooser.randrange(1, len(paths)))
        for path in bad:
            match chooser.randrange(4):
                case 0:
                    path.unlink()
                case 1:
                    path.write_bytes(whole[path][: chooser.randrange(len(whole[path]))])
                case 2:
                    path.write_bytes(whole[chooser.choice([other for other in paths if other != path])])
                case _:
                    flip_bit(path, chooser.randrange(8 * len(whole[path])))
        assert sorted(error.path or "" for error in verify(tmp_path)) == sorted(map(str, bad))
        for path in bad:
            path.write_bytes(whole[path])
    assert verify(tmp_path) == []


def test_verify_finds_a_lost_array_and_a_damaged_journal(tmp_path: Path) -> None:
    rollout(tmp_path, 3)
    metadata = tmp_path / "kv.zarr" / "opaque" / "zarr.json"
    saved = metadata.read_bytes()
    metadata.unlink()
    assert len(verify(tmp_path)) == 1
    metadata.write_bytes(saved)
    flip_bit(tmp_path / "journal", 300)
    assert any("journal is damaged" in str(error) for error in verify(tmp_path))
