"""The resume part of ``longtake bench tiers``: a run's folder is made, and gone on with from copies of it.

Files of the history are linked, not copied, and the page cache is told to forget them before each time. The first time
is not counted: the layers are compiled in it.
"""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longtake.engine import record
from longtake.engine.tiers_disk import NUM_THREADS, forget
from longtake.offload.files import FileOps
from longtake.offload.layout import Chunk
from longtake.offload.run import RunDirectory
from longtake.offload.store import BlockStore

if TYPE_CHECKING:
    from longtake.engine.bench_tiers import Stage


class _Unsynced(FileOps):
    """For the journal of a long run: it only has to be there."""

    def fsync(self, fd: int) -> None:
        """Nothing."""


def bench_resume(stage: Stage, work: Path) -> dict[str, Any]:
    """Seconds from a folder to its next block."""
    shot, window, shape = stage.shot, stage.bench.window_blocks, stage.shape
    frames = shot.model.block_frames * shot.model.temporal_stride
    num_blocks = max(window, round(60 * stage.bench.minutes * shot.fps / frames))
    needed = (0, *range(num_blocks - window + 1, num_blocks))
    _make_run(stage, work / "resumed", num_blocks, needed)
    samples: list[dict[str, float]] = []
    for _ in range(1 + 3):
        shutil.copytree(work / "resumed", work / "again", copy_function=_copy)
        forget(work / "again")
        samples.append(_resume(stage, work / "again", needed))
        shutil.rmtree(work / "again")
    return {
        "run_minutes": stage.bench.minutes,
        "run_blocks": num_blocks,
        "journal_bytes": (work / "resumed" / "journal").stat().st_size,
        "history_read_bytes": len(needed) * shape.block_bytes,
        **{name: record.summary([one[name] for one in samples[1:]]) for name in samples[0]},
    }


def _copy(source: str, target: str) -> None:
    """A file that a run only reads or replaces is linked."""
    if Path(source).name.startswith("c."):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def _make_run(stage: Stage, folder: Path, num_blocks: int, needed: tuple[int, ...]) -> None:
    """The folder of a run of so many blocks that keeps the needed ones.

    Every needed block has the same bytes in files of its own: links would leave nothing to be read after the first.
    """
    run = RunDirectory(folder, shape=stage.shape, config_hash="bench", ops=_Unsynced())
    shape, made = stage.shape, run.store
    store = BlockStore(made.root, array=made.array, layout=made.layout, rows=shape.codec.rows)
    generator = np.random.default_rng(0)
    sizes = [(shape.num_heads, shape.payload_bytes(layer)) for layer in range(shape.num_layers)]
    pages = [generator.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    checksums_RH = np.zeros((shape.num_rows, shape.num_heads), dtype=np.uint32)

    def write(place: tuple[int, Chunk]) -> None:
        block, chunk = place
        written_rh = store.write_chunk(block, chunk, pages)
        checksums_RH[chunk.rows.start : chunk.rows.stop, chunk.heads.start : chunk.heads.stop] = written_rh

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        list(threads.map(write, product(needed, store.chunks)))
    for block in range(num_blocks):
        run.commit(block, checksums_RH)
    run.note_dropped(sorted(set(range(num_blocks)) - set(needed)))
    run.close()


def _resume(stage: Stage, folder: Path, needed: tuple[int, ...]) -> dict[str, float]:
    times = [time.perf_counter()]
    run = RunDirectory(folder, shape=stage.shape, config_hash="bench", disk_io=stage.bench.ways[-1])
    times.append(time.perf_counter())
    cache = stage.cache(stage.bench.window_blocks + 1, run)
    stage.wait()
    times.append(time.perf_counter())
    cache.prepare(needed).release()
    stage.wait()
    times.append(time.perf_counter())
    rollout = stage.rollout(cache)
    rollout.step()
    stage.wait()
    times.append(time.perf_counter())
    cache.flush()
    times.append(time.perf_counter())
    rollout.close()
    cache.close()
    run.close()
    names = ("journal_s", "tiers_s", "history_s", "block_s", "until_durable_s")
    parts = {name: later - earlier for name, earlier, later in zip(names, times, times[1:], strict=False)}
    return {**parts, "first_block_s": times[4] - times[0]}
