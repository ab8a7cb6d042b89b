"""Blocks that a shot's folder no longer needs: gone, journaled, and known to all."""

from __future__ import annotations

from pathlib import Path

import pytest

from longtake.kernels.errors import StorageError
from longtake.offload.cache import KVCache
from longtake.offload.run import RunDirectory, committed_blocks, kept_blocks
from longtake.offload.verify import verify
from tests.offload.payloads import SHAPE, check_passes, commit, open_run
from tests.offload.runs import BUDGET, chunk_blocks, gang, rollout, write


def test_dropped_blocks_are_gone_and_all_know_it(tmp_path: Path) -> None:
    rollout(tmp_path, 8)
    run = open_run(tmp_path)
    with pytest.raises(StorageError, match="block 8 is to be dropped but not durable"):
        run.drop([1, 8])
    run.drop([1, 2, 3, 6])
    before = (tmp_path / "journal").stat().st_size
    run.drop([2, 3])
    assert (tmp_path / "journal").stat().st_size == before, "nothing new to be journaled"
    assert chunk_blocks(run) == {0, 4, 5, 7} and (run.num_blocks, run.num_kept) == (8, 4)
    assert [block for block in range(9) if run.keeps(block)] == [0, 4, 5, 7]
    run.close()
    assert verify(tmp_path) == [] and (committed_blocks(tmp_path, 2), kept_blocks(tmp_path, 2)) == (8, 4)
    run = open_run(tmp_path)
    cache = KVCache(shape=SHAPE, device="cpu", budget=BUDGET, run=run)
    check_passes(cache, (0, 4, 7))
    with pytest.raises(StorageError, match=r"deleted from the disk.*block 3"):
        cache.prepare((0, 3))
    commit(cache, 8)
    check_passes(cache, (8, 5))
    cache.close()
    run.close()
    assert verify(tmp_path) == []


@pytest.mark.parametrize("num_removed", [0, 1, 3])
def test_crash_while_dropping(tmp_path: Path, num_removed: int) -> None:
    rollout(tmp_path, 6)
    run = open_run(tmp_path)
    run.note_dropped([1, 2, 3, 4])
    for block in range(1, 1 + num_removed):
        run.store.remove(block)
    run.store.path(4, run.store.chunks[0]).unlink()
    run.close(orderly=False)
    assert verify(tmp_path) == [] and kept_blocks(tmp_path, 2) == 2
    run = open_run(tmp_path)
    assert chunk_blocks(run) == {0, 5} and run.num_kept == 2
    run.close()


def test_a_folder_that_dropped_what_is_needed_is_refused_unchanged(tmp_path: Path) -> None:
    rollout(tmp_path, 6)
    run = open_run(tmp_path)
    run.drop([1, 2])
    run.close()
    journal, files = (tmp_path / "journal").read_bytes(), sorted(path.name for path in tmp_path.rglob("*"))

    def reads(num_blocks: int) -> range:
        return range(max(0, num_blocks - 2), num_blocks)

    for committed in (3, 4):
        with pytest.raises(StorageError, match=f"block {committed} is the next.*block {committed - 2},.*--fresh"):
            RunDirectory(tmp_path, shape=SHAPE, config_hash="c", agree=lambda own, at=committed: at, reads=reads)  # type: ignore[misc]
    assert (tmp_path / "journal").read_bytes() == journal
    assert sorted(path.name for path in tmp_path.rglob("*")) == files
    run = RunDirectory(tmp_path, shape=SHAPE, config_hash="c", agree=lambda own: 5, reads=reads)
    assert (run.num_blocks, run.num_kept) == (5, 3)
    run.close()


def test_a_dropped_block_that_is_committed_again_is_there(tmp_path: Path) -> None:
    rollout(tmp_path, 6)
    run = open_run(tmp_path)
    run.drop([4, 5])
    run.close()
    RunDirectory(tmp_path, shape=SHAPE, config_hash="c", agree=lambda own: 4).close()
    rollout(tmp_path, 6)
    assert kept_blocks(tmp_path, 2) == 6 and verify(tmp_path) == []


def test_another_gang_knows_what_one_rank_dropped(tmp_path: Path) -> None:
    ranks = gang(tmp_path, 2)
    for run in ranks:
        for block in range(4):
            write(run, block)
    ranks[0].drop([0, 1])  # the gang died before the other rank did the same
    for run in ranks:
        run.close(orderly=False)
    assert verify(tmp_path) == []
    (run,) = gang(tmp_path, 1)
    assert (run.num_blocks, run.num_kept) == (4, 2) and chunk_blocks(run) == {2, 3}
    run.close()
    assert verify(tmp_path) == []
