"""The disk's part of ``longtake bench tiers``: its own speed, and the cache's spill and prefetch beside it.

Alike in both: files as large as chunks of the history, threads, the way to the disk, temporary names and renames, bytes
that come from and go to memory of a block's size that the system has already given. Written is timed until every file
and the folder is fsynced; before a read the page cache is told to forget the files. Every pass moves the same bytes;
the disk and the cache take turns in going first, as the first one may find the disk rested, and the second one memory
that is there.

A rate of spilling or prefetching counts from the first commit to the last record, a steady one from the first block's
end to the last block's: without the first block's way through empty tiers.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longtake.engine import record
from longtake.engine.timing import await_device
from longtake.kernels.clock import survive
from longtake.offload.cache import CacheBudget, KVCache
from longtake.offload.chunkfiles import ChunkFiles, DiskIO
from longtake.offload.deepnvme import open_files
from longtake.offload.files import fsync_dir
from longtake.offload.layout import CRC_BYTES, chunk_layout
from longtake.offload.run import RunDirectory
from longtake.offload.shape import ModelKVShape

NUM_THREADS = 4
_MB, _GB = 1e6, 1e9


def bench_disk(
    results: dict[str, Any],
    shape: ModelKVShape,
    device: torch.device,
    work: Path,
    ways: Sequence[DiskIO],
    failed: dict[str, str],
    num_blocks: int,
    passes: int,
) -> Iterator[str]:
    """Measure a disk, and the cache on it.

    Args:
        results: filled; by way: MB/s (10^6 bytes) of the disk itself, of spill and of prefetch, and their ratios.
        shape: of the history.
        device: at the other end of the host pool.
        work: a folder on the disk.
        ways: how it is reached, one after the other.
        failed: told of ways that fail.
        num_blocks: of a pass, two or more; their bytes are written and read.
        passes: of each kind; medians are of these.

    Yields:
        The names of the ways that are measured.
    """
    layout = chunk_layout(shape)
    results |= {
        "block_bytes": shape.block_bytes,
        "file_bytes": layout.file_bytes,
        "num_blocks": num_blocks,
        "threads": NUM_THREADS,
        "load_before": os.getloadavg(),
    }
    for wish in ways:
        with survive(failed, f"disk, {wish.value}"):
            files = open_files(wish, work, file_bytes=layout.file_bytes)
            try:
                bench = _Bench(shape=shape, device=device, work=work, wish=wish, files=files, num_blocks=num_blocks)
                samples = [bench.one_pass(own_first=bool(turn % 2)) for turn in range(passes + 1)][1:]
            finally:
                files.close()
            found: dict[str, Any] = {name: record.summary([one[name] for one in samples]) for name in samples[0]}
            for name, own in (
                ("spill", "write"),
                ("steady_spill", "write"),
                ("prefetch", "read"),
                ("steady_prefetch", "read"),
            ):
                ratios = [one[f"{name}_MB_s"] / one[f"{own}_MB_s"] for one in samples]
                found[f"{name}_to_own_{own}_speed"] = record.summary(ratios)
            results[wish.value] = {"used": files.name, **found}
            results["load_after"] = os.getloadavg()
            yield wish.value


class _Bench:
    """One way to the disk."""

    def __init__(
        self, *, shape: ModelKVShape, device: torch.device, work: Path, wish: DiskIO, files: ChunkFiles, num_blocks: int
    ) -> None:
        self.shape, self.device, self.work = shape, device, work
        self.wish, self.files, self.num_blocks = wish, files, num_blocks
        self.file_bytes = chunk_layout(shape).file_bytes
        num_files = shape.block_bytes // (self.file_bytes - CRC_BYTES)
        self.contents_FB = np.random.default_rng(0).integers(0, 256, (num_files, self.file_bytes), dtype=np.uint8)

    def one_pass(self, own_first: bool) -> dict[str, float]:
        """The figures of both; each leaves nothing behind, what a file system does about deleted files included."""
        found: dict[str, float] = {}
        for part in (self._own, self._cache) if own_first else (self._cache, self._own):
            folder = self.work / "pass"
            try:
                found |= part(folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                os.sync()
        return found

    def _own(self, folder: Path) -> dict[str, float]:
        """Writing and reading plain files."""
        folder.mkdir()
        num_files = self.num_blocks * len(self.contents_FB)

        def write(number: int) -> None:
            self.files.write(folder / f"file{number}", [self.contents_FB[number % len(self.contents_FB)]])

        def read(number: int) -> None:
            into = self.contents_FB[number % len(self.contents_FB)]
            self.files.read(folder / f"file{number}", [into], 0, self.file_bytes)

        def each(job: Callable[[int], None]) -> None:
            with ThreadPoolExecutor(NUM_THREADS) as threads:
                list(threads.map(job, range(num_files)))
            fsync_dir(self.files.ops, folder)

        written = self._timed("write", lambda: each(write))
        forget(folder)
        return written | self._timed("read", lambda: each(read))

    def _cache(self, folder: Path) -> dict[str, float]:
        """Spilling and prefetching."""
        run = RunDirectory(folder, shape=self.shape, config_hash="bench", disk_io=self.wish)
        try:
            spilled = self._spill(run)
            forget(folder)
            return spilled | self._prefetch(run)
        finally:
            run.close()

    def _timed(self, name: str, job: Callable[[], object]) -> dict[str, float]:
        cpu, started = time.process_time(), time.perf_counter()
        job()
        took_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        num_bytes = self.num_blocks * self.shape.block_bytes
        return {f"{name}_MB_s": num_bytes / took_s / _MB, f"{name}_cpu_s_per_GB": cpu_s / num_bytes * _GB}

    def _steady(self, ends_s: list[float]) -> float:
        """MB/s after the first block."""
        return (len(ends_s) - 1) * self.shape.block_bytes / (ends_s[-1] - ends_s[0]) / _MB

    def _spill(self, run: RunDirectory) -> dict[str, float]:
        """From the first commit until the last block is durable, blocks committed as fast as the cache takes them."""
        ends_s: list[float] = []

        def on_step(name: str, block: int) -> None:
            if name == "journaled":
                ends_s.append(time.perf_counter())

        shape, device = self.shape, self.device
        budget = CacheBudget(num_blocks=1, device_bytes=2 * shape.block_bytes)
        cache = KVCache(shape=shape, device=device, budget=budget, run=run, num_writers=NUM_THREADS, on_step=on_step)
        generator = torch.Generator(device=device).manual_seed(0)
        random = partial(torch.randint, 0, 256, generator=generator, dtype=torch.uint8, device=device)
        pages = [random((shape.num_heads, shape.payload_bytes(layer))) for layer in range(shape.num_layers)]

        def commit_all() -> None:
            for block in range(self.num_blocks):
                commit = cache.begin_commit(block)
                for layer in range(shape.num_layers):
                    commit.page(layer).copy_(pages[layer])
                commit.complete()
                cache.retain(())
            cache.flush()

        try:
            _touch(cache)
            return self._timed("spill", commit_all) | {"steady_spill_MB_s": self._steady(ends_s)}
        finally:
            cache.close()

    def _prefetch(self, run: RunDirectory) -> dict[str, float]:
        """Blocks read one a plan, plans announced four ahead, until the last one is on the device."""
        ends_s: list[float] = []
        budget = CacheBudget(device_bytes=3 * self.shape.block_bytes)
        cache = KVCache(shape=self.shape, device=self.device, budget=budget, run=run, num_readers=NUM_THREADS)

        def read_all() -> None:
            for block in range(self.num_blocks):
                cache.schedule([(later,) for later in range(block, min(block + 5, self.num_blocks))])
                with cache.prepare((block,)):
                    ends_s.append(time.perf_counter())
            await_device(self.device)

        try:
            _touch(cache)
            return self._timed("prefetch", read_all) | {"steady_prefetch_MB_s": self._steady(ends_s)}
        finally:
            cache.close()


def _touch(cache: KVCache) -> None:
    """Have the system give all memory of the tiers, as pinning it does; it is not the disk's time."""
    pages = [page_HP for frame in range(cache.arena.num_frames) for page_HP in cache.arena.frame(frame)]
    for page_HP in pages if cache._host is None else (*pages, *cache._host.pool.slabs):
        page_HP.zero_()
    await_device(cache.device)


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache, once they are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
