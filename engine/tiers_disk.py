"""The disk's part of ``longtake bench tiers``: its own speed, and the cache's spill and prefetch beside it.

All files are as large as chunks of the history. Written is timed until every file and the folder is fsynced; before a
read the page cache is told to forget the files. Every pass moves the same bytes, passes of both kinds alternate.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from longtake.offload.layout import chunk_layout
from longtake.offload.run import RunDirectory
from longtake.offload.shape import ModelKVShape

NUM_THREADS = 4
_MB = 1e6


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
        num_blocks: of a pass; their bytes are written and read.
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
                samples = [_pass(shape, device, work, wish, files, num_blocks) for _ in range(passes + 1)][1:]
            finally:
                files.close()
            found: dict[str, Any] = {name: record.summary([one[name] for one in samples]) for name in samples[0]}
            for name, own in (("spill", "write"), ("prefetch", "read")):
                ratios = [one[f"{name}_MB_s"] / one[f"{own}_MB_s"] for one in samples]
                found[f"{name}_to_own_{own}_speed"] = record.summary(ratios)
            results[wish.value] = {"used": files.name, **found}
            results["load_after"] = os.getloadavg()
            yield wish.value


def _pass(
    shape: ModelKVShape, device: torch.device, work: Path, wish: DiskIO, files: ChunkFiles, num_blocks: int
) -> dict[str, float]:
    num_files = num_blocks * shape.block_bytes // (chunk_layout(shape).file_bytes - 4)
    try:
        (work / "raw").mkdir()
        found = _own_speed(work / "raw", files, chunk_layout(shape).file_bytes, num_files)
        run = RunDirectory(work / "run", shape=shape, config_hash="bench", disk_io=wish)
        try:
            found["spill_MB_s"] = _spill(shape, device, run, num_blocks)
            forget(work / "run")
            found["prefetch_MB_s"] = _prefetch(shape, device, run, num_blocks)
        finally:
            run.close()
    finally:
        shutil.rmtree(work / "raw")
        shutil.rmtree(work / "run", ignore_errors=True)
        os.sync()  # what a file system does about deleted files, it does now
    return found


def _own_speed(folder: Path, files: ChunkFiles, file_bytes: int, num_files: int) -> dict[str, float]:
    """MB/s of writing and reading plain files."""
    content = np.random.default_rng(0).integers(0, 256, file_bytes, dtype=np.uint8)

    def write(number: int) -> None:
        files.write(folder / f"file{number}", [content])

    def read(number: int) -> None:
        files.read(folder / f"file{number}", [np.empty_like(content)], 0, file_bytes)

    def timed(job: Callable[[int], None]) -> float:
        started = time.perf_counter()
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            list(threads.map(job, range(num_files)))
        fsync_dir(files.ops, folder)
        return num_files * file_bytes / (time.perf_counter() - started) / _MB

    cpu = time.process_time()
    written = timed(write)
    write_cpu = time.process_time() - cpu
    forget(folder)
    cpu = time.process_time()
    seen = timed(read)
    gigabytes = num_files * file_bytes / 1e9
    return {
        "write_MB_s": written,
        "read_MB_s": seen,
        "write_cpu_s_per_GB": write_cpu / gigabytes,
        "read_cpu_s_per_GB": (time.process_time() - cpu) / gigabytes,
    }


def _spill(shape: ModelKVShape, device: torch.device, run: RunDirectory, num_blocks: int) -> float:
    """MB/s from the first commit until the last block is durable, blocks committed as fast as the cache takes them."""
    budget = CacheBudget(num_blocks=1, device_bytes=2 * shape.block_bytes)
    cache = KVCache(shape=shape, device=device, budget=budget, run=run, num_writers=NUM_THREADS)
    try:
        generator = torch.Generator(device=device).manual_seed(0)
        size = (shape.num_layers, shape.num_heads, shape.payload_bytes)
        payload_LHP = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8, device=device)
        _touch(cache)
        started = time.perf_counter()
        for block in range(num_blocks):
            commit = cache.begin_commit(block)
            for layer in range(shape.num_layers):
                commit.page(layer).copy_(payload_LHP[layer])
            commit.complete()
            cache.retain(())
        cache.flush()
        return num_blocks * shape.block_bytes / (time.perf_counter() - started) / _MB
    finally:
        cache.close()


def _prefetch(shape: ModelKVShape, device: torch.device, run: RunDirectory, num_blocks: int) -> float:
    """MB/s of blocks read one a plan, plans announced four ahead, until the last one is on the device."""
    budget = CacheBudget(device_bytes=3 * shape.block_bytes)
    cache = KVCache(shape=shape, device=device, budget=budget, run=run, num_readers=NUM_THREADS)
    try:
        _touch(cache)
        started = time.perf_counter()
        for block in range(num_blocks):
            with cache.prepare((block,)):
                cache.schedule([(later,) for later in range(block + 1, min(block + 5, num_blocks))])
        await_device(device)
        return num_blocks * shape.block_bytes / (time.perf_counter() - started) / _MB
    finally:
        cache.close()


def _touch(cache: KVCache) -> None:
    """Have the system give all memory of the tiers, as pinning it does; it is not the disk's time."""
    cache.arena.pages_GHP.zero_()
    if cache._host is not None:
        cache._host.pool.slabs_LFHP.zero_()
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
