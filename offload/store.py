"""The disk tier: payloads in a Zarr v3 array that plain zarr reads.

    kv.zarr/<codec>    [block, layer, head, bytes] uint8, bytes + crc32c codecs, chunks as in layout.py
                       [block, row, head, bytes] where a codec gives layers different numbers of bytes

zarr makes and grows the array (its metadata); chunk files are written and read here, because a chunk under these codecs
is its bytes in C order followed by their CRC-32C, and going through zarr would copy them twice and lets a missing file
read as zeros. What exists is the journal's to say.

Legend: L layers, R rows of a block, H heads of this rank, P payload bytes of a layer, U of a unit, r and h rows and
heads of a chunk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from longtake.kernels.errors import ConfigError, LongtakeError, StorageError
from longtake.offload.checksums import EqualParts
from longtake.offload.chunkfiles import ChunkFiles, WrongSizeError
from longtake.offload.durable import DurableStore
from longtake.offload.errors import MissingChunkError, from_os_error
from longtake.offload.files import PARTIAL_SUFFIX, Bytes, as_bytes, crc32c, fsync_dir
from longtake.offload.layout import CRC_BYTES, Chunk, ChunkLayout

Checksums = npt.NDArray[np.uint32]
Payloads = npt.NDArray[np.uint8]
Pages = Sequence[Payloads] | Payloads
"""A block on a rank: uint8 [H, P] by layer, each contiguous."""

GROW_BLOCKS = 4096
_NO_METADATA = (KeyError, ValueError, TypeError, AttributeError)
"""What zarr raises when its JSON is none, or another."""


class BlockStore:
    """One codec's array, as one rank sees it. Any number of threads may write and read different chunks at once."""

    def __init__(
        self,
        root: Path,
        *,
        array: str,
        layout: ChunkLayout,
        heads: range | None = None,
        rows: Sequence[int] = (),
        files: ChunkFiles | None = None,
    ) -> None:
        """Bind to an array that `create` made.

        Args:
            root: the Zarr group's folder.
            array: the array's name.
            layout: its chunks.
            heads: of the model, that this rank keeps; None: all.
            rows: of each layer, as its pages hold them; none: a page is a row.
            files: how chunk files are moved; None: by the system's calls.

        Raises:
            ConfigError: the heads cut a chunk in two.
        """
        self.root = root
        self.array = array
        self.layout = layout
        self.heads = range(layout.model_heads) if heads is None else heads
        counts = rows or (1,) * layout.num_rows
        starts = accumulate(counts, initial=0)
        self._rows = tuple(range(start, start + count) for start, count in zip(starts, counts, strict=False))
        self.chunks = tuple(layout.chunks(self.heads))
        self.files = files or ChunkFiles()
        self._ops = self.files.ops
        self._parts = EqualParts(layout.unit_bytes)
        self._room_blocks = 0

    @classmethod
    def create(
        cls,
        root: Path,
        *,
        array: str,
        layout: ChunkLayout,
        heads: range | None = None,
        rows: Sequence[int] = (),
        num_blocks: int | None = None,
        files: ChunkFiles | None = None,
    ) -> BlockStore:
        """Make the array if it is not there, check it if it is.

        Only the rank that has head 0 writes metadata, so that ranks cannot race.

        Args:
            num_blocks: blocks to make room for in the array's shape; None: a stride of GROW_BLOCKS.

        Raises:
            ConfigError: the array there is of another model, codec or chunking.
            StorageError, DiskFullError: the metadata cannot be written.
        """
        store = cls(root, array=array, layout=layout, heads=heads, rows=rows, files=files)
        try:
            (root / array).mkdir(parents=True, exist_ok=True)
            for folder in (root.parent, root):  # or blocks that the journal lists would be gone with a folder's name
                fsync_dir(store._ops, folder)
            if store.heads.start == 0:
                store._create_metadata(num_blocks or GROW_BLOCKS)
        except LongtakeError:
            raise
        except OSError as error:
            raise from_os_error(error, "making the Zarr array", path=root / array) from error
        except _NO_METADATA as error:
            raise _no_metadata(root, error) from error
        return store

    def _create_metadata(self, num_blocks: int) -> None:
        group = DurableStore(self.root, files=self.files)
        zarr.open_group(group, mode="a")
        if (self.root / self.array / "zarr.json").exists():
            found = layout_of(self.root, self.array)
            if found != self.layout:
                raise ConfigError(f"the array holds {found}, not {self.layout}", path=self.root / self.array)
            self.grow(num_blocks)
            return
        zarr.create_array(
            group,
            name=self.array,
            shape=(num_blocks, self.layout.num_rows, self.layout.model_heads, self.layout.unit_bytes),
            chunks=(1, self.layout.chunk_rows, self.layout.chunk_heads, self.layout.unit_bytes),
            dtype="uint8",
            serializer=BytesCodec(endian=None),
            compressors=[Crc32cCodec()],
            filters=None,
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("block", self.layout.of, "head", "bytes"),
            config={"write_empty_chunks": True},
        )

    def grow(self, num_blocks: int) -> None:
        """Widen the array's shape to hold at least `num_blocks`, in strides; shrinks nothing, touches no chunk.

        Only the rank that has head 0 does so.
        """
        if self.heads.start or num_blocks <= self._room_blocks:
            return
        try:
            array = _open_array(DurableStore(self.root, files=self.files), self.array)
            if array.shape[0] < num_blocks:
                array.resize((-(-num_blocks // GROW_BLOCKS) * GROW_BLOCKS, *array.shape[1:]))
            self._room_blocks = array.shape[0]
        except OSError as error:
            raise from_os_error(error, "growing the Zarr array", path=self.root / self.array) from error

    def path(self, block: int, chunk: Chunk) -> Path:
        """A chunk's file."""
        return self.root / self.array / chunk.key(block)

    def write_chunk(self, block: int, chunk: Chunk, pages: Pages) -> Checksums:
        """Write one chunk of a block: whole and fsynced under its name, or not at all.

        Args:
            block: its number.
            chunk: one of `chunks`.
            pages: the block on this rank.

        Returns:
            CRC-32C of its units, uint32 [r, h].

        Raises:
            DiskFullError: no room.
            StorageError: the disk failed.
        """
        path = self.path(block, chunk)
        pieces = self._pieces(chunk, chunk.rows, pages)
        checksums_rh = self._checksums(pieces, len(chunk.heads))
        trailer = self._parts.combine(checksums_rh.reshape(-1).tolist())
        try:
            self.files.write(path, [*pieces, as_bytes(trailer.to_bytes(CRC_BYTES, "little"))])
        except OSError as error:
            raise from_os_error(error, "writing a chunk", path=path, block=block) from error
        return checksums_rh

    def sync_names(self, block: int) -> None:
        """Make the names of all chunks written so far durable; call it once a block, before the journal record."""
        try:
            fsync_dir(self._ops, self.root / self.array)
        except OSError as error:
            raise from_os_error(
                error, "forcing a folder to the disk", path=self.root / self.array, block=block
            ) from error

    def read_chunk(self, block: int, chunk: Chunk, out: Pages, checksums_RH: Checksums) -> None:
        """Read one chunk and check it against its own checksum and the journal's.

        Args:
            out: the block on this rank; only the chunk's part is written.
            checksums_RH: the journal's, of this rank's heads.

        Raises:
            MissingChunkError, StorageError: naming block, layer, head and file.
        """
        pieces = self._pieces(chunk, chunk.rows, out)
        trailer = np.empty(CRC_BYTES, dtype=np.uint8)
        expected_rh = checksums_RH[chunk.rows.start : chunk.rows.stop, self._own(chunk.heads)]

        def read(files: ChunkFiles) -> None:
            self._read(files, block, chunk, [*pieces, trailer], 0)
            checksums_rh = self._checksums(pieces, len(chunk.heads))
            self._compare(block, chunk, chunk.rows, checksums_rh, expected_rh)
            if self._parts.combine(checksums_rh.reshape(-1).tolist()) != int.from_bytes(trailer.tobytes(), "little"):
                what = "the chunk's own checksum is damaged"
                raise self._damage(block, chunk.rows[0], chunk.heads[0], what, self.path(block, chunk))

        self._reading(read)

    def read_page(self, block: int, layer: int, out_HP: Payloads, checksums_RH: Checksums) -> None:
        """Read one layer of a block on this rank, checked against the journal's checksums.

        Args:
            out_HP: contiguous.
            checksums_RH: the journal's, of this rank's heads.

        Raises:
            MissingChunkError, StorageError: naming block, layer, head and file.
        """
        wanted, pages = self._rows[layer], {layer: out_HP}
        for chunk in self.chunks:
            rows = range(max(wanted.start, chunk.rows.start), min(wanted.stop, chunk.rows.stop))
            if rows:
                self._reading(partial(self._read_rows, block, chunk, rows, pages, checksums_RH))

    def _read_rows(
        self,
        block: int,
        chunk: Chunk,
        rows: range,
        pages: Mapping[int, Payloads],
        checksums_RH: Checksums,
        files: ChunkFiles,
    ) -> None:
        """Some rows of one chunk, all of one layer."""
        pieces = self._pieces(chunk, rows, pages)
        before = (rows.start - chunk.rows.start) * len(chunk.heads)
        self._read(files, block, chunk, pieces, before * self.layout.unit_bytes)
        checksums_rh = self._checksums(pieces, len(chunk.heads))
        self._compare(block, chunk, rows, checksums_rh, checksums_RH[rows.start : rows.stop, self._own(chunk.heads)])

    def _reading(self, read: Callable[[ChunkFiles], None]) -> None:
        """Read; where a disk's error shows as other bytes only, once more by a way that tells it."""
        try:
            read(self.files)
        except StorageError:
            if self.files.tells_errors:
                raise
            read(ChunkFiles(self._ops))

    def remove(self, block: int) -> None:
        """Delete this rank's chunks of a block; missing ones are fine."""
        for chunk in self.chunks:
            try:
                self._ops.unlink(self.path(block, chunk))
            except OSError as error:
                raise from_os_error(error, "deleting a chunk", path=self.path(block, chunk), block=block) from error

    def remove_orphans(self, num_blocks: int, dropped: Collection[int] = ()) -> list[Path]:
        """Delete this rank's chunks that no journal lists: those of blocks from `num_blocks` on, and partial files.

        Args:
            dropped: blocks before those that were to be deleted, too.

        Returns:
            What was deleted.
        """
        try:
            orphans = [
                path
                for block, path in self._own_files()
                if block >= num_blocks or block in dropped or path.suffix == PARTIAL_SUFFIX
            ]
            for path in orphans:
                self._ops.unlink(path)
            if orphans:
                fsync_dir(self._ops, self.root / self.array)
        except OSError as error:
            raise from_os_error(error, "deleting orphans", path=self.root / self.array) from error
        return orphans

    def _own_files(self) -> Iterator[tuple[int, Path]]:
        grid = {(chunk.row_index, chunk.head_index) for chunk in self.chunks}
        for entry in os.scandir(self.root / self.array):
            parts = entry.name.removesuffix(PARTIAL_SUFFIX).split(".")
            if len(parts) == 5 and parts[0] == "c" and all(part.isdecimal() for part in parts[1:]):
                block, row, head, _ = map(int, parts[1:])
                if (row, head) in grid:
                    yield block, Path(entry.path)

    def _own(self, heads: range) -> slice:
        return slice(heads.start - self.heads.start, heads.stop - self.heads.start)

    def _pieces(self, chunk: Chunk, rows: range, pages: Pages | Mapping[int, Payloads]) -> list[Bytes]:
        """Some rows of the chunk in file order, as views into the block's pages: units of one head lie together."""
        pieces, unit = [], self.layout.unit_bytes
        for layer, of_layer in enumerate(self._rows):
            first, last = max(rows.start, of_layer.start), min(rows.stop, of_layer.stop)
            if first >= last:
                continue
            page_hP = pages[layer][self._own(chunk.heads)]
            part_hrU = page_hP.reshape(len(chunk.heads), -1, unit)[:, first - of_layer.start : last - of_layer.start]
            if len(chunk.heads) == 1 or part_hrU.shape[1] == 1 == len(of_layer):
                pieces.append(part_hrU.reshape(-1))
            else:
                pieces += [part_hrU[head, row] for row in range(last - first) for head in range(len(chunk.heads))]
        return pieces

    def _checksums(self, pieces: Iterable[Bytes], num_heads: int) -> Checksums:
        size = self.layout.unit_bytes
        values = [crc32c(piece[first : first + size]) for piece in pieces for first in range(0, piece.size, size)]
        return np.array(values, dtype=np.uint32).reshape(-1, num_heads)

    def _read(self, files: ChunkFiles, block: int, chunk: Chunk, buffers: list[Bytes], offset: int) -> None:
        path = self.path(block, chunk)
        rows = f"{self.layout.of}s {chunk.rows[0]}-{chunk.rows[-1]}"
        where = f"block {block}, {rows}, heads {chunk.heads[0]}-{chunk.heads[-1]}"
        try:
            files.read(path, buffers, offset, self.layout.file_bytes)
        except WrongSizeError as error:
            raise StorageError(f"{where}: {error}", block=block, path=path) from error
        except FileNotFoundError as error:
            raise MissingChunkError(
                f"{where}: the journal lists this chunk but its file is missing", block=block, path=path
            ) from error
        except OSError as error:
            raise from_os_error(error, f"reading {where}", path=path, block=block) from error

    def _compare(self, block: int, chunk: Chunk, rows: range, checksums_rh: Checksums, expected_rh: Checksums) -> None:
        for row, head in np.argwhere(checksums_rh != expected_rh).tolist():
            raise self._damage(
                block,
                rows[row],
                chunk.heads[head],
                f"checksum {checksums_rh[row, head]:08x}, the journal says {expected_rh[row, head]:08x}",
                self.path(block, chunk),
            )

    def _damage(self, block: int, row: int, head: int, what: str, path: Path) -> StorageError:
        return StorageError(f"block {block}, {self.layout.of} {row}, head {head}: {what}", block=block, path=path)


def _no_metadata(path: Path, error: Exception) -> StorageError:
    return StorageError(f"the array's metadata cannot be read: {error}; render the shot anew with --fresh", path=path)


def _open_array(store: DurableStore, name: str) -> zarr.Array[Any]:
    array = zarr.open_group(store, mode="r" if store.read_only else "r+")[name]
    if not isinstance(array, zarr.Array):
        raise StorageError("this is no Zarr array", path=store.root / name)
    return array


def layout_of(root: Path, array: str) -> ChunkLayout:
    """The chunking of an array on the disk, from its metadata.

    Raises:
        StorageError: there is no such array, or not one of ours.
    """
    try:
        found = _open_array(DurableStore(root, read_only=True), array)
    except (*_NO_METADATA, OSError) as error:
        raise _no_metadata(root / array, error) from error
    names = tuple(getattr(found.metadata, "dimension_names", None) or ())
    dimension = str(names[1]) if len(names) == 4 else ""
    if len(found.shape) != 4 or not dimension or found.chunks[0] != 1 or found.chunks[3] != found.shape[3]:
        raise StorageError(f"the array has shape {found.shape} in chunks {found.chunks}", path=root / array)
    return ChunkLayout(
        num_rows=found.shape[1],
        model_heads=found.shape[2],
        unit_bytes=found.shape[3],
        chunk_rows=found.chunks[1],
        chunk_heads=found.chunks[2],
        of=dimension,
    )
