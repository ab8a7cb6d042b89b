"""Disks that are full, slow, failing or lying: a running cache stops at a block, or waits, and loses nothing."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from longtake.kernels.errors import LongtakeError, StorageError
from longtake.offload.cache import CacheBudget, KVCache
from longtake.offload.chunkfiles import ChunkFiles, DiskIO
from longtake.offload.errors import DiskFullError
from longtake.offload.files import Bytes, FileOps
from longtake.offload.run import RunDirectory
from longtake.offload.spill import STEPS, Step
from longtake.offload.verify import verify
from tests.offload.aio import files_of
from tests.offload.faults import FaultyOps, flip_bit
from tests.offload.payloads import SHAPE, check_pages, check_passes, commit, open_run

B = SHAPE.block_bytes


@pytest.fixture(params=["system", "aio"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the disk."""

    def open_files(wish: DiskIO, folder: Path, *, file_bytes: int, ops: FileOps) -> ChunkFiles:
        return files_of(request.param, folder, file_bytes=file_bytes, ops=ops)

    monkeypatch.setattr("longtake.offload.run.open_files", open_files)


def open_cache(
    path: Path, *, ops: FaultyOps | None = None, device: int = 6, host: int = 6, on_step: Step | None = None
) -> tuple[KVCache, RunDirectory]:
    run = open_run(path, ops)
    budget = CacheBudget(device_bytes=device * B, host_bytes=host * B)
    return KVCache(shape=SHAPE, device="cpu", budget=budget, run=run, on_step=on_step), run


def close(cache: KVCache, run: RunDirectory, *, drain: bool = True) -> None:
    cache.close(drain=drain)
    run.close(orderly=drain)


def commit_until_it_raises(cache: KVCache, most: int = 200) -> LongtakeError:
    with pytest.raises(LongtakeError) as caught:
        for block in range(cache.num_committed, most):
            commit(cache, block)
        cache.flush()
    return caught.value


def assert_prefix_is_whole(path: Path, at_least: int) -> int:
    """What a later run finds: every committed block readable, no damage."""
    assert verify(path) == []
    cache, run = open_cache(path)
    found = cache.num_committed
    assert found >= at_least
    for first in range(0, found, 4):
        check_passes(cache, range(first, min(found, first + 4)), 1)
    commit(cache, found)
    cache.flush()
    check_passes(cache, (found,))
    close(cache, run)
    return found


@pytest.mark.parametrize("room", [0, 1, 50, 500, 3000, 9001])
def test_full_disk_stops_at_a_block_and_keeps_what_was_committed(tmp_path: Path, room: int) -> None:
    ops = FaultyOps()
    cache, run = open_cache(tmp_path, ops=ops)
    for block in range(3):
        commit(cache, block)
    cache.flush()
    ops.free_bytes = room
    error = commit_until_it_raises(cache)
    assert isinstance(error, DiskFullError) and "free some space" in str(error)
    durable = cache.durable_blocks
    assert durable >= 3
    for call in (lambda: cache.prepare((0,)), lambda: cache.begin_commit(cache.num_committed), cache.flush):
        with pytest.raises(DiskFullError):
            call()
    close(cache, run, drain=False)
    assert assert_prefix_is_whole(tmp_path, durable) == durable


def test_disk_budget_is_a_full_disk(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    budget = CacheBudget(device_bytes=6 * B, disk_bytes=4 * B + 1)
    cache = KVCache(shape=SHAPE, device="cpu", budget=budget, run=run)
    error = commit_until_it_raises(cache)
    assert isinstance(error, DiskFullError) and error.block == 4 and "disk budget" in str(error)
    cache.flush()
    close(cache, run)
    assert_prefix_is_whole(tmp_path, 4)


def test_dropping_makes_room_in_the_disk_budget(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    cache = KVCache(shape=SHAPE, device="cpu", budget=CacheBudget(device_bytes=6 * B, disk_bytes=4 * B), run=run)
    for block in range(20):
        assert cache.disk_room_blocks == 4 - block + max(0, block - 3)
        commit(cache, block)
        cache.flush()
        if block >= 3:
            cache.drop([block - 3])
            assert cache.tiers()["disk"].used_bytes == 3 * B
    check_passes(cache, (17, 18, 19))
    close(cache, run)
    assert verify(tmp_path) == []


@pytest.mark.parametrize("what", ["write", "fsync"])
def test_failing_disk_stops_at_a_block(tmp_path: Path, what: str) -> None:
    ops = FaultyOps(short=100)
    cache, run = open_cache(tmp_path, ops=ops)
    for block in range(4):
        commit(cache, block)
    cache.flush()
    if what == "write":
        ops.fail_writes = 1
    else:
        ops.fail_fsync = True
    assert isinstance(commit_until_it_raises(cache), StorageError)
    durable = cache.durable_blocks  # more than 4 where a later block's write was the one that failed
    assert durable == 4 or what == "write"
    close(cache, run, drain=False)
    assert assert_prefix_is_whole(tmp_path, 4) == durable


def test_failed_read_changes_nothing_and_may_be_tried_again(tmp_path: Path) -> None:
    cache, run = open_cache(tmp_path)
    for block in range(9):
        commit(cache, block)
    close(cache, run)
    ops = FaultyOps()
    cache, run = open_cache(tmp_path, ops=ops, host=3)
    check_passes(cache, (3,))
    ops.fail_reads = 1000
    with pytest.raises(StorageError, match="reading block"):
        cache.prepare((0, 1, 2, 3))
    ops.fail_reads = 0
    assert cache._device.table.num_pinned == 0
    check_passes(cache, (0, 1, 2, 3))
    close(cache, run)


def test_read_still_failing_for_a_plan_given_up_is_tried_again_for_the_next(tmp_path: Path) -> None:
    class SlowToFail(FaultyOps):
        """Block 1's failures are told only when they may be."""

        begun, may_end = threading.Event(), threading.Event()

        def read(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
            if self.fail_reads and "/c.1." in os.readlink(f"/proc/self/fd/{fd}"):
                self.begun.set()
                self.may_end.wait()
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(fd, buffers, offset)

    cache, run = open_cache(tmp_path)
    for block in range(9):
        commit(cache, block)
    close(cache, run)
    ops = SlowToFail()
    cache, run = open_cache(tmp_path, ops=ops, host=3)
    ops.fail_reads = 1000
    with pytest.raises(StorageError, match="reading block 0"):
        cache.prepare((0, 1))
    assert ops.begun.wait(60)
    ops.fail_reads = 0
    threading.Timer(0.2, ops.may_end.set).start()
    check_passes(cache, (1, 0))
    close(cache, run)


def test_damage_is_named_when_it_is_read_and_spares_the_rest(tmp_path: Path) -> None:
    cache, run = open_cache(tmp_path)
    for block in range(9):
        commit(cache, block)
    close(cache, run)
    cache, run = open_cache(tmp_path, host=2)
    flip_bit(run.store.path(4, run.store.chunks[1]), 8 * (5 * 24) + 3)
    cache.schedule([(4,), (3,)])  # a prefetch that fails is no error until the block is wanted
    with pytest.raises(StorageError, match=r"block 4, layer 5, head 1: .*c\.4\.0\.1\.0"):
        cache.prepare((3, 4))
    check_passes(cache, (3, 5, 0))
    assert check_passes(cache, (3, 2, 1, 0, 5, 6))
    with pytest.raises(StorageError, match="block 4, layer 5, head 1"):
        check_passes(cache, range(1, 7))
    commit(cache, 9)
    close(cache, run)


def test_a_block_that_cannot_be_read_keeps_no_other_from_being_read_ahead(tmp_path: Path) -> None:
    cache, run = open_cache(tmp_path)
    for block in range(9):
        commit(cache, block)
    close(cache, run)
    cache, run = open_cache(tmp_path)
    flip_bit(run.store.path(4, run.store.chunks[1]), 3)
    cache.schedule([(4,)])
    assert cache._host is not None
    while 4 not in cache._host._unreadable:
        time.sleep(0.001)
    with cache._lock:
        cache.schedule([(4, 3)])
        assert cache._host.arriving(3)
    check_passes(cache, (3,))
    close(cache, run)


def test_damage_in_a_page_streamed_from_the_disk(tmp_path: Path) -> None:
    cache, run = open_cache(tmp_path)
    for block in range(4):
        commit(cache, block)
    close(cache, run)
    cache, run = open_cache(tmp_path, device=3, host=2)
    flip_bit(run.store.path(0, run.store.chunks[1]), 8 * (5 * 24) + 3)
    with cache.prepare(range(4)) as reading:
        assert reading.streamed
        with pytest.raises(StorageError, match="block 0, layer 5, head 1"):
            for layer in range(SHAPE.num_layers):
                assert layer <= 5
                check_pages(reading, layer, range(4))
        with pytest.raises(StorageError, match="block 0, layer 5, head 1"):
            reading.pages(5)  # and not what was in the slot before
        for layer in (6, 7, 0, 1, 2):
            check_pages(reading, layer, range(4))
    assert cache._device.table.num_pinned == 0
    check_passes(cache, (3, 2))
    commit(cache, 4)
    close(cache, run)


def test_slow_disk_holds_the_producer_back_and_nothing_grows(tmp_path: Path) -> None:
    ops = FaultyOps()
    cache, run = open_cache(tmp_path, ops=ops, host=3)
    plain_wait, most, num_waits = cache._lock.wait, 0, 0

    def wait(timeout: float | None = None) -> bool:
        """The disk stands still until someone waits for it."""
        nonlocal num_waits
        num_waits += 1
        ops.may_write.set()
        return plain_wait(timeout)

    cache._lock.wait = wait  # type: ignore[method-assign]
    ops.may_write.clear()
    ops.write_delay_s = 0.004
    before = cache.memory()
    checksum_bytes = 4 * SHAPE.num_layers * SHAPE.num_heads
    for block in range(25):
        commit(cache, block)
        most = max(most, cache.num_committed - cache.durable_blocks)
        check_passes(cache, range(max(0, block - 2), block + 1), 1)
    assert most <= 3 and num_waits > 0
    cache.flush()
    assert cache.memory() == before | {"host_checksums": 25 * checksum_bytes}
    assert cache.durable_blocks == 25 and cache.stats().max_lag_s > 0 and cache.stats().stalled_host_s > 0
    close(cache, run)
    assert_prefix_is_whole(tmp_path, 25)


def test_reads_go_on_while_writes_wait(tmp_path: Path) -> None:
    cache, run = open_cache(tmp_path)
    for block in range(8):
        commit(cache, block)
    close(cache, run)
    ops = FaultyOps()
    cache, run = open_cache(tmp_path, ops=ops, host=3)
    ops.may_write.clear()
    for block in (8, 9):
        commit(cache, block)
    check_passes(cache, (0, 1, 2, 3))
    assert cache.durable_blocks == 8, "a read waited for a write"
    ops.may_write.set()
    close(cache, run)


# -- crashes


def run_in_child(path: Path, kill_at: Callable[[str, int], bool], ready: int = -1) -> int:
    """Fork a process that commits blocks until it is killed; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)

        def on_step(name: str, block: int) -> None:
            if kill_at(name, block):
                os.kill(os.getpid(), signal.SIGKILL)

        cache, _ = open_cache(path, on_step=on_step)
        if ready >= 0:
            os.write(ready, b"x")
        for block in range(cache.num_committed, 100_000):
            check_passes(cache, range(max(0, block - 2), block), 1)
            commit(cache, block)
    finally:
        os._exit(1)


def assert_killed(child: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_each_step_of_a_commit(tmp_path: Path, step: str) -> None:
    for run_number in range(3):
        at = 3 * run_number + 2
        assert_killed(run_in_child(tmp_path, lambda name, block, at=at: name == step and block == at))  # type: ignore[misc]
        assert verify(tmp_path) == []
        run = open_run(tmp_path)
        match step:
            case "journaled":
                assert run.num_blocks == at + 1
            case "chunks" | "names":
                assert run.num_blocks == at
            case _:
                assert at - 6 <= run.num_blocks <= at  # chunks of later blocks are written while earlier ones are
        run.close(orderly=False)
    assert_prefix_is_whole(tmp_path, 2 if step in ("staged", "chunk") else 8)


def test_killed_at_random_instants(tmp_path: Path) -> None:
    chooser = random.Random(11)
    committed, longest_s = 0, 0.03
    for _ in range(20):
        reader, writer = os.pipe()
        child = run_in_child(tmp_path, lambda name, block: False, writer)
        os.close(writer)
        assert os.read(reader, 1), "it ended before it was ready"
        os.close(reader)
        time.sleep(chooser.random() * longest_s)
        os.kill(child, signal.SIGKILL)
        assert_killed(child)
        assert verify(tmp_path) == []
        run = open_run(tmp_path)
        assert run.num_blocks >= committed
        longest_s = 0.03 if run.num_blocks > committed else 1.5 * longest_s  # a busy machine still gets on
        committed = run.num_blocks
        run.close(orderly=False)
    assert committed > 0
    assert_prefix_is_whole(tmp_path, committed)
