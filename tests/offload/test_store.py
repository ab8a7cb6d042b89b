"""Chunks on disk: readable by plain zarr, whole or absent, and every kind of damage named."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import zarr

from longtake.kernels.errors import ConfigError, StorageError
from longtake.offload.checksums import EqualParts
from longtake.offload.durable import DurableStore
from longtake.offload.errors import DiskFullError, MissingChunkError
from longtake.offload.files import Bytes, FileOps, crc32c
from longtake.offload.layout import MAX_CHUNK_BYTES, ChunkLayout, chunk_layout
from longtake.offload.run import RunDirectory
from longtake.offload.shape import ModelKVShape
from longtake.offload.store import GROW_BLOCKS, BlockStore, Checksums, Payloads, layout_of
from tests.offload.aio import WAYS, files_of
from tests.offload.faults import FaultyOps, flip_bit
from tests.offload.payloads import Opaque

LAYOUT = ChunkLayout(num_rows=4, model_heads=4, unit_bytes=3000, chunk_rows=2, chunk_heads=1)


def payloads(block: int, layout: ChunkLayout = LAYOUT, heads: int | None = None) -> Payloads:
    size = (layout.num_rows, heads or layout.model_heads, layout.unit_bytes)
    return np.random.default_rng(block).integers(0, 256, size, dtype=np.uint8)


def checksums_of(payloads_LHP: Payloads) -> Checksums:
    return np.array([[crc32c(head) for head in layer] for layer in payloads_LHP], dtype=np.uint32)


def write_block(store: BlockStore, block: int, payloads_LHP: Payloads) -> Checksums:
    for chunk in store.chunks:
        written = store.write_chunk(block, chunk, payloads_LHP)
        assert written.shape == (len(chunk.rows), len(chunk.heads))
    store.sync_names(block)
    return checksums_of(payloads_LHP)


def read_block(store: BlockStore, block: int, checksums_LH: Checksums) -> Payloads:
    out = np.full((LAYOUT.num_rows, len(store.heads), LAYOUT.unit_bytes), 255, dtype=np.uint8)
    for chunk in store.chunks:
        store.read_chunk(block, chunk, out, checksums_LH)
    return out


def plain(root: Path, mode: Literal["r", "r+"] = "r") -> Any:
    return zarr.open_array(str(root / "kv.zarr" / "opaque"), mode=mode)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def new_store(root: Path, way: str, ops: FaultyOps | None = None) -> BlockStore:
    files = files_of(way, root, file_bytes=LAYOUT.file_bytes, ops=ops)
    return BlockStore.create(root / "kv.zarr", array="opaque", layout=LAYOUT, files=files)


@pytest.mark.parametrize("chunk_heads", [1, 2, 4])
@pytest.mark.parametrize("chunk_rows", [1, 2, 4])
def test_plain_zarr_reads_what_ranks_wrote(tmp_path: Path, way: str, chunk_rows: int, chunk_heads: int) -> None:
    layout = ChunkLayout(num_rows=4, model_heads=4, unit_bytes=3000, chunk_rows=chunk_rows, chunk_heads=chunk_heads)
    files = files_of(way, tmp_path, file_bytes=layout.file_bytes)
    whole = {block: payloads(block) for block in range(3)}
    for first in range(0, 4, chunk_heads):
        heads = range(first, first + chunk_heads)
        rank = BlockStore.create(tmp_path / "kv.zarr", array="opaque", layout=layout, heads=heads, files=files)
        for block, payloads_LHP in whole.items():
            write_block(rank, block, np.ascontiguousarray(payloads_LHP[:, first : first + chunk_heads]))
    array = plain(tmp_path)
    assert array.shape == (GROW_BLOCKS, 4, 4, 3000)
    everyone = BlockStore(tmp_path / "kv.zarr", array="opaque", layout=layout, files=files)
    for block, payloads_LHP in whole.items():
        assert np.array_equal(array[block], payloads_LHP)
        out = np.zeros_like(payloads_LHP)
        for chunk in everyone.chunks:
            everyone.read_chunk(block, chunk, out, checksums_of(payloads_LHP))
        assert np.array_equal(out, payloads_LHP)
        for layer in range(4):
            out_HP = np.zeros_like(out[0])
            everyone.read_page(block, layer, out_HP, checksums_of(payloads_LHP))
            assert np.array_equal(out_HP, payloads_LHP[layer])


def test_what_plain_zarr_writes_is_read(tmp_path: Path, way: str) -> None:
    store = new_store(tmp_path, way)
    array = plain(tmp_path, "r+")
    array[5] = payloads(5)
    assert np.array_equal(read_block(store, 5, checksums_of(payloads(5))), payloads(5))


@pytest.mark.parametrize("block", range(2))
def test_it_is_a_zarr_store(tmp_path: Path, way: str, block: int) -> None:
    """zarr itself writes chunks through the way to the disk, and plain zarr reads them."""
    store = new_store(tmp_path, way)
    array = zarr.open_group(DurableStore(store.root, files=store.files), mode="r+")["opaque"]
    assert isinstance(array, zarr.Array)
    array[block] = payloads(block)
    assert np.array_equal(plain(tmp_path)[block], payloads(block))
    assert np.array_equal(read_block(store, block, checksums_of(payloads(block))), payloads(block))


def test_array_grows_in_strides_and_is_checked_on_reopening(tmp_path: Path, way: str) -> None:
    new_store(tmp_path, way).grow(GROW_BLOCKS + 1)
    assert plain(tmp_path).shape[0] == 2 * GROW_BLOCKS
    new_store(tmp_path, way)
    assert layout_of(tmp_path / "kv.zarr", "opaque") == LAYOUT
    other = ChunkLayout(num_rows=4, model_heads=4, unit_bytes=3001, chunk_rows=2, chunk_heads=1)
    with pytest.raises(ConfigError, match="unit_bytes=3001"):
        BlockStore.create(tmp_path / "kv.zarr", array="opaque", layout=other)


def test_missing_chunk_is_an_error_and_not_zeros(tmp_path: Path, way: str) -> None:
    store = new_store(tmp_path, way)
    checksums = write_block(store, 0, payloads(0))
    store.path(0, store.chunks[5]).unlink()
    with pytest.raises(MissingChunkError, match=r"block 0, layers 2-3, heads 1-1: .*missing.*c\.0\.1\.1\.0"):
        read_block(store, 0, checksums)
    with pytest.raises(MissingChunkError, match="block 0"):
        store.read_page(0, 3, np.empty((4, 3000), dtype=np.uint8), checksums)


def test_truncated_or_longer_chunk_is_refused(tmp_path: Path, way: str) -> None:
    store = new_store(tmp_path, way)
    checksums = write_block(store, 0, payloads(0))
    path = store.path(0, store.chunks[0])
    whole = path.read_bytes()
    for size in (0, 1, len(whole) - 1, len(whole) + 1):
        path.write_bytes((whole + b"\0")[:size])
        with pytest.raises(StorageError, match=f"has {size} bytes"):
            read_block(store, 0, checksums)


def test_a_thousand_flipped_bits_are_all_found_and_named(tmp_path: Path, way: str) -> None:
    store = new_store(tmp_path, way)
    checksums = write_block(store, 7, payloads(7))
    chooser = random.Random(0)
    for _ in range(1000):
        chunk = chooser.choice(store.chunks)
        path = store.path(7, chunk)
        bit = chooser.randrange(LAYOUT.file_bytes * 8)
        flip_bit(path, bit)
        layer, head = chunk.rows[0] + min(bit // 8 // LAYOUT.unit_bytes, 1), chunk.heads[0]
        in_trailer = bit // 8 >= LAYOUT.file_bytes - 4
        where = f"block 7, layer {chunk.rows[0] if in_trailer else layer}, head {head}: .*{path.name}"
        with pytest.raises(StorageError, match=where):
            read_block(store, 7, checksums)
        if not in_trailer:
            with pytest.raises(StorageError, match=where):
                store.read_page(7, layer, np.empty((4, 3000), dtype=np.uint8), checksums)
        flip_bit(path, bit)
    assert np.array_equal(read_block(store, 7, checksums), payloads(7))


def test_a_chunk_of_another_block_under_this_name_is_found(tmp_path: Path, way: str) -> None:
    store = new_store(tmp_path, way)
    checksums = write_block(store, 0, payloads(0))
    write_block(store, 1, payloads(1))
    store.path(1, store.chunks[0]).replace(store.path(0, store.chunks[0]))
    with pytest.raises(StorageError, match="the journal says"):
        read_block(store, 0, checksums)


def files_in(root: Path) -> list[Path]:
    return [path for path in (root / "kv.zarr" / "opaque").iterdir() if path.name != "zarr.json"]


def test_full_disk_leaves_no_file(tmp_path: Path, way: str) -> None:
    ops = FaultyOps()
    store = new_store(tmp_path, way, ops)
    ops.free_bytes = 50
    with pytest.raises(DiskFullError, match="disk is full") as caught:
        store.write_chunk(3, store.chunks[0], payloads(3))
    assert caught.value.block == 3
    assert not files_in(tmp_path)
    ops.free_bytes = None
    assert np.array_equal(read_block(store, 3, write_block(store, 3, payloads(3))), payloads(3))


@pytest.mark.parametrize("name", ["zarr.json", "opaque/zarr.json"])
@pytest.mark.parametrize("text", ["", "[]", "null", '{"zarr_format": 9, "node_type": "group"}'])
def test_damaged_metadata_is_named(tmp_path: Path, name: str, text: str) -> None:
    new_store(tmp_path, "system")
    (tmp_path / "kv.zarr" / name).write_text(text)
    for call in (lambda: layout_of(tmp_path / "kv.zarr", "opaque"), lambda: new_store(tmp_path, "system")):
        with pytest.raises(StorageError, match="metadata cannot be read"):
            call()


def test_the_first_error_of_a_failed_write_is_told(tmp_path: Path) -> None:
    class NothingWorks(FaultyOps):
        def unlink(self, path: Path) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    ops = NothingWorks()
    store = new_store(tmp_path, "system", ops)
    ops.fail_writes = 1
    with pytest.raises(StorageError, match="writing a chunk failed: Input/output error"):
        store.write_chunk(0, store.chunks[0], payloads(0))


def test_names_of_new_folders_are_forced_to_the_disk(tmp_path: Path) -> None:
    class Watched(FileOps):
        synced: ClassVar[set[str]] = set()

        def fsync(self, fd: int) -> None:
            self.synced.add(os.readlink(f"/proc/self/fd/{fd}"))

    path = tmp_path / "film" / "shot"
    shape = ModelKVShape(num_layers=4, num_heads=4, codec=Opaque(unit_bytes=3000))
    RunDirectory(path, shape=shape, config_hash="c", ops=Watched()).close()
    for folder in (tmp_path / "film", path, path / "kv.zarr", path / "kv.zarr" / "opaque"):
        assert str(folder) in Watched.synced, folder


def test_the_page_cache_keeps_nothing_of_a_chunk_that_is_on_the_disk_or_was_read(tmp_path: Path) -> None:
    class Watched(FaultyOps):
        calls: ClassVar[list[str]] = []

        def write(self, fd: int, buffers: Sequence[Bytes]) -> int:
            self.calls.append("write")
            return super().write(fd, buffers)

        def fsync(self, fd: int) -> None:
            self.calls.append("fsync")
            super().fsync(fd)

        def forget(self, fd: int) -> None:
            self.calls.append("forget")
            super().forget(fd)

        def replace(self, source: Path, target: Path) -> None:
            self.calls.append("name")
            super().replace(source, target)

    store = new_store(tmp_path, "system", Watched())
    Watched.calls.clear()
    store.write_chunk(0, store.chunks[0], payloads(0))
    assert Watched.calls == ["write", "fsync", "forget", "name"]
    checksums, out = checksums_of(payloads(0)), np.zeros_like(payloads(0))
    store.read_chunk(0, store.chunks[0], out, checksums)
    assert Watched.calls[4:] == ["forget"]
    for chunk in store.chunks[1:]:
        store.write_chunk(0, chunk, payloads(0))
    Watched.calls.clear()
    store.read_page(0, 0, out[0], checksums)
    assert Watched.calls == [], "its files are read on, layer by layer"


def test_short_transfers_go_on(tmp_path: Path) -> None:
    store = new_store(tmp_path, "system", FaultyOps(short=13))
    checksums = write_block(store, 0, payloads(0))
    assert np.array_equal(read_block(store, 0, checksums), payloads(0))


@pytest.mark.parametrize("short", [0, 4096])
def test_short_writes_that_nobody_tells_of_are_found(tmp_path: Path, short: int) -> None:
    ops = FaultyOps()
    store = new_store(tmp_path, "aio", ops)
    ops.short = short
    with pytest.raises(StorageError, match=f"writing a chunk failed: only {short} of 8192 bytes reached the disk"):
        store.write_chunk(1, store.chunks[0], payloads(1))
    assert not files_in(tmp_path)


def test_failing_disk(tmp_path: Path, way: str) -> None:
    ops = FaultyOps()
    store = new_store(tmp_path, way, ops)
    checksums = write_block(store, 0, payloads(0))
    ops.fail_reads = 1000
    with pytest.raises(StorageError, match="reading block 0"):
        read_block(store, 0, checksums)
    ops.fail_reads = 0
    assert np.array_equal(read_block(store, 0, checksums), payloads(0))
    if way != "deepnvme":  # its writes are no system calls of ours
        ops.fail_writes = 1
        with pytest.raises(StorageError, match="writing a chunk"):
            store.write_chunk(1, store.chunks[0], payloads(1))
    ops.fail_fsync = True
    with pytest.raises(StorageError, match="writing a chunk"):
        store.write_chunk(1, store.chunks[0], payloads(1))
    assert not store.path(1, store.chunks[0]).exists()


def test_a_read_that_fails_once_is_tried_by_a_way_that_tells(tmp_path: Path) -> None:
    ops = FaultyOps()
    store = new_store(tmp_path, "aio", ops)
    checksums = write_block(store, 0, payloads(0))
    ops.fail_reads = 1
    assert np.array_equal(read_block(store, 0, checksums), payloads(0))
    assert ops.fail_reads == 0


def test_orphans_are_this_ranks_late_blocks_and_partial_files(tmp_path: Path) -> None:
    root = tmp_path / "kv.zarr"
    ranks = [BlockStore.create(root, array="opaque", layout=LAYOUT, heads=range(h, h + 2)) for h in (0, 2)]
    for rank in ranks:
        for block in range(3):
            write_block(rank, block, payloads(block, heads=2))
    (root / "opaque" / "c.1.0.0.0.partial").write_bytes(b"x")
    removed = ranks[0].remove_orphans(2)
    assert sorted(path.name for path in removed) == [
        "c.1.0.0.0.partial",
        "c.2.0.0.0",
        "c.2.0.1.0",
        "c.2.1.0.0",
        "c.2.1.1.0",
    ]
    assert ranks[1].path(2, ranks[1].chunks[0]).exists()
    assert (root / "opaque" / "zarr.json").exists()


def test_layout_follows_the_rule() -> None:
    def chosen(layers: int, heads: int, size: int) -> tuple[int, int, float]:
        shape = ModelKVShape(num_layers=layers, num_heads=heads, codec=Opaque(unit_bytes=size))
        layout = chunk_layout(shape)
        assert layers % layout.chunk_rows == 0 and heads % layout.chunk_heads == 0
        return layout.chunk_rows, layout.chunk_heads, layout.file_bytes / 2**20

    assert chosen(10, 4, 46080)[:2] == (10, 1)  # mini, BF16
    assert chosen(30, 12, 350_000)[:2] == (15, 1)  # 1.3B, 2.33 bits
    assert chosen(40, 40, 2 * 4680 * 128 * 2)[:2] == (2, 1)  # 14B, BF16
    for layers, heads, size in ((30, 12, 350_000), (30, 12, 2_396_160), (40, 40, 349_000)):
        assert 0.5 <= chosen(layers, heads, size)[2] <= MAX_CHUNK_BYTES / 2**20
    assert chosen(31, 1, 9 << 20)[:2] == (1, 1)
    with pytest.raises(ConfigError, match="cut a chunk"):
        list(ChunkLayout(num_rows=1, model_heads=4, unit_bytes=1, chunk_rows=1, chunk_heads=2).chunks(range(1)))


def test_combined_checksum_equals_that_of_the_whole() -> None:
    parts = np.random.default_rng(0).integers(0, 256, (9, 777), dtype=np.uint8)
    assert EqualParts(777).combine(crc32c(part) for part in parts) == crc32c(parts.reshape(-1))
    assert EqualParts(777).combine([]) == 0
