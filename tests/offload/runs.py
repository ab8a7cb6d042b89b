"""A shot's folder with blocks in it, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from longtake.offload.cache import CacheBudget, KVCache
from longtake.offload.files import crc32c
from longtake.offload.run import RunDirectory, committed_blocks
from longtake.offload.shape import ModelKVShape
from longtake.offload.store import Checksums
from tests.offload.payloads import SHAPE, Opaque, commit, open_run, pages_on_host

BUDGET = CacheBudget(device_bytes=6 * SHAPE.block_bytes)


def rollout(path: Path, num_blocks: int) -> None:
    """Go on to `num_blocks` blocks and end in order."""
    run = open_run(path)
    cache = KVCache(shape=SHAPE, device="cpu", budget=BUDGET, run=run)
    for block in range(cache.num_committed, num_blocks):
        commit(cache, block)
    cache.flush()
    cache.close()
    run.close()


def write(run: RunDirectory, block: int) -> None:
    """Make a block durable without a cache."""
    for chunk in run.store.chunks:
        run.store.write_chunk(block, chunk, pages_on_host(block, run.shape))
    run.commit(block, checksums(run.shape, block))


def checksums(shape: ModelKVShape, block: int) -> Checksums:
    """Of a block's units, row by row."""
    units = [page_HP.reshape(len(page_HP), -1, shape.unit_bytes) for page_HP in pages_on_host(block, shape)]
    rows = [page_HrU[:, row] for page_HrU in units for row in range(page_HrU.shape[1])]
    return np.array([[crc32c(unit) for unit in row_HU] for row_HU in rows], dtype=np.uint32)


def chunk_blocks(run: RunDirectory) -> set[int]:
    """Blocks of which some file is there."""
    return {int(path.name.split(".")[1]) for path in (run.path / "kv.zarr" / "opaque").glob("c.*")}


HEADS = 4


def gang(path: Path, num_ranks: int, rows: tuple[int, ...] = ()) -> list[RunDirectory]:
    """Every rank of a gang, opened as real ranks do: all replay and agree before any writes."""
    heads, codec = HEADS // num_ranks, Opaque(unit_bytes=20, rows=rows)
    shapes = [
        ModelKVShape(num_layers=3, num_heads=heads, codec=codec, first_head=rank * heads, total_heads=HEADS)
        for rank in range(num_ranks)
    ]
    least = committed_blocks(path, HEADS)
    return [
        RunDirectory(path, shape=shape, config_hash="c", rank=rank, num_ranks=num_ranks, agree=lambda own: least)
        for rank, shape in enumerate(shapes)
    ]
