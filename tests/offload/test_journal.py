"""The journal under crashes, damage, full disks and rival writers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.kernels.errors import StorageError
from longtake.offload.errors import DiskFullError, FencedError
from longtake.offload.journal import Journal, replay
from longtake.offload.records import (
    BlockCommitted,
    Closed,
    Opened,
    Record,
    RolledBack,
    SegmentWritten,
    decode,
    encode,
    history,
    pack_checksums,
)
from tests.offload.faults import FaultyOps, Unsynced, flip_bit


def block(number: int) -> BlockCommitted:
    checksums_RH = np.arange(6, dtype=np.uint32).reshape(2, 3) + number
    return BlockCommitted(
        block=number, array="int4", first_head=0, num_layers=2, num_heads=3, checksums=pack_checksums(checksums_RH)
    )


def write(path: Path, *records: Record) -> None:
    journal = Journal(path, config_hash="c")
    for record in records:
        journal.append(record)
    journal.close()


def test_every_kind_survives_its_encoding() -> None:
    records: list[Record] = [
        Opened(epoch=3, config_hash="é"),
        block(4),
        SegmentWritten(index=0, path="segments/0.mp4", checksum=2, num_blocks=5, num_frames=57),
        RolledBack(num_blocks=4),
        Closed(num_blocks=4),
    ]
    assert [decode(encode(record)) for record in records] == records
    assert block(4).checksums_RH.tolist() == [[4, 5, 6], [7, 8, 9]]


def test_replays_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert replay(path).records == ()
    write(path, block(0), block(1))
    write(path, block(2), Closed(num_blocks=3))
    seen = replay(path)
    assert seen.epoch == 2 and seen.torn_bytes == 0
    assert seen.records == (
        Opened(epoch=1, config_hash="c"),
        block(0),
        block(1),
        Opened(epoch=2, config_hash="c"),
        block(2),
        Closed(num_blocks=3),
    )
    state = history(seen.records)
    assert state.num_blocks == 3 and state.closed and state.config_hash == "c"


def test_cut_at_every_byte_keeps_the_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    ends = []
    journal = Journal(path, config_hash="c")
    ends.append(path.stat().st_size)
    for number in range(3):
        journal.append(block(number))
        ends.append(path.stat().st_size)
    journal.close()
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        survivors = max(0, sum(end <= cut for end in ends) - 1)
        assert history(replay(path).records).num_blocks == survivors
        reopened = Journal(path, config_hash="c", ops=Unsynced())
        reopened.append(block(survivors))
        reopened.close()
        assert history(replay(path).records).num_blocks == survivors + 1
        assert replay(path).torn_bytes == 0


@settings(max_examples=40)
@given(garbage=st.binary(min_size=1, max_size=200))
def test_garbage_tail_is_cut(tmp_path_factory: pytest.TempPathFactory, garbage: bytes) -> None:
    path = tmp_path_factory.mktemp("tail") / "journal"
    write(path, block(0))
    with path.open("ab") as file:
        file.write(garbage)
    assert replay(path).torn_bytes == len(garbage)
    write(path, block(1))
    assert history(replay(path).records).num_blocks == 2


def test_every_flipped_bit_before_the_tail_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path, block(0), block(1))
    whole = path.read_bytes()
    last = len(whole) - len(encode(block(1))) - 20
    chooser = random.Random(1)
    for bit in chooser.sample(range(last * 8), 500):
        path.write_bytes(whole)
        flip_bit(path, bit)
        with pytest.raises(StorageError):
            replay(path)
        with pytest.raises(StorageError):
            Journal(path, config_hash="c")


def test_flipped_bit_in_the_last_record_never_passes(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path, block(0), block(1))
    whole = path.read_bytes()
    last = len(whole) - len(encode(block(1))) - 20
    for bit in range(last * 8, len(whole) * 8, 7):
        path.write_bytes(whole)
        flip_bit(path, bit)
        assert history(replay(path).records).num_blocks == 1


def test_an_older_writer_is_fenced_out(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    old = Journal(path, config_hash="c")
    old.append(block(0))
    new = Journal(path, config_hash="c")
    assert new.epoch == old.epoch + 1
    with pytest.raises(FencedError, match="epoch 1"):
        old.append(block(1))
    new.append(block(1))
    assert history(replay(path).records).num_blocks == 2


def test_a_stale_record_that_slips_in_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    old = Journal(path, config_hash="c")
    new = Journal(path, config_hash="c")
    old._end = path.stat().st_size  # as if its look at the length came before the new writer's first record
    old.append(block(0))
    seen = replay(path)
    assert seen.num_fenced == 1 and history(seen.records).num_blocks == 0
    with pytest.raises(FencedError):
        new.append(block(0))


def test_full_disk_leaves_the_journal_usable(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    ops = FaultyOps()
    journal = Journal(path, config_hash="c", ops=ops)
    journal.append(block(0))
    ops.free_bytes = 30
    with pytest.raises(DiskFullError, match="nothing journaled is lost"):
        journal.append(block(1))
    assert replay(path).torn_bytes == 0
    ops.free_bytes = None
    journal.append(block(1))
    assert history(replay(path).records).num_blocks == 2


def test_failed_fsync_ends_the_writer(tmp_path: Path) -> None:
    ops = FaultyOps()
    journal = Journal(tmp_path / "journal", config_hash="c", ops=ops)
    ops.fail_fsync = True
    with pytest.raises(StorageError, match="forcing the journal"):
        journal.append(block(0))
    ops.fail_fsync = False
    with pytest.raises(StorageError, match="cannot be written since"):
        journal.append(block(0))


def test_short_writes_are_continued(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, config_hash="c", ops=FaultyOps(short=7))
    journal.append(block(0))
    assert history(replay(path).records).num_blocks == 1


def test_rollback_takes_back_what_came_after() -> None:
    state = history(
        [
            block(0),
            SegmentWritten(index=0, path="s0", checksum=0, num_blocks=1, num_frames=9),
            block(1),
            SegmentWritten(index=1, path="s1", checksum=0, num_blocks=2, num_frames=12),
            RolledBack(num_blocks=1),
            block(1),
        ]
    )
    assert state.num_blocks == 2
    assert [segment.path for segment in state.segments] == ["s0"]


def test_not_a_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text("something else entirely")
    with pytest.raises(StorageError, match="no journal"):
        Journal(path, config_hash="c")
    assert path.read_text() == "something else entirely"


def test_a_newer_version_is_refused() -> None:
    with pytest.raises(StorageError, match="newer"):
        decode(b'{"version":99,"kind":"block"}')
    with pytest.raises(StorageError, match="newer"):
        decode(b'{"version":1,"kind":"hologram"}')
    with pytest.raises(StorageError, match="wrong fields"):
        decode(b'{"version":1,"kind":"closed","num_blocks":1,"more":2}')
