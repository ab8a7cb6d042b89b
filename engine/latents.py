"""Clean latents of a shot on disk: what video, continuation and resume are made from.

Latents are small (a thousandth of the K/V they cause), and the VAE decoder's state follows from the last few of them
exactly, so they are kept for the whole shot and no decoder state ever is. A Zarr v3 array [block, C, F, Y, X] float32
with one crc32c'd chunk a block, in one folder. zarr writes the array's metadata; chunks are written and read here,
whole and on the disk or not there, because zarr neither fsyncs nor tells a missing chunk from an empty one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import BytesCodec, Crc32cCodec

from longtake.kernels.errors import StorageError
from longtake.offload.chunkfiles import ChunkFiles
from longtake.offload.durable import DurableStore
from longtake.offload.errors import from_os_error
from longtake.offload.files import PARTIAL_SUFFIX, FileOps, as_bytes, crc32c, fsync_dir, write_file

_CRC_BYTES = 4


class LatentLog:
    """The latents of one shot; one writer, any readers.

    Args:
        path: of the array; made when it is not there.
        num_blocks: of the shot.
        block_shape: (C, F, Y, X) of a block.
        ops: the system calls to use.

    Raises:
        StorageError, DiskFullError: what is there has another shape or is damaged; it cannot be made.
    """

    def __init__(
        self, path: Path, num_blocks: int, block_shape: tuple[int, int, int, int], *, ops: FileOps | None = None
    ) -> None:
        self.path = path
        self._ops = ops or FileOps()
        self._num_blocks, self._block_shape = num_blocks, block_shape
        if not (path / "zarr.json").exists():
            self._create()
        found = _array_shape(path)
        if found != (num_blocks, *block_shape):
            raise StorageError(
                f"these are latents of shape {found}, not {(num_blocks, *block_shape)}; render again with --fresh",
                path=path,
            )

    @classmethod
    def existing(cls, path: Path) -> LatentLog:
        """The log of a shot that was rendered before.

        Raises:
            StorageError: there is none, or its metadata is damaged.
        """
        num_blocks, *block_shape = _array_shape(path)
        return cls(path, num_blocks, (block_shape[0], block_shape[1], block_shape[2], block_shape[3]))

    def _create(self) -> None:
        try:
            zarr.create_array(
                store=DurableStore(self.path, files=ChunkFiles(self._ops)),
                shape=(self._num_blocks, *self._block_shape),
                chunks=(1, *self._block_shape),
                dtype="float32",
                serializer=BytesCodec(),
                compressors=[Crc32cCodec()],
                fill_value=float("nan"),
                chunk_key_encoding={"name": "default", "separator": "."},
                dimension_names=("block", "channel", "frame", "row", "column"),
            )
        except OSError as error:
            raise from_os_error(error, "making the latent log", path=self.path) from error

    def __len__(self) -> int:
        """Blocks that the array has room for."""
        return self._num_blocks

    def chunk(self, block: int) -> Path:
        """The file of a block."""
        return self.path / f"c.{block}.0.0.0.0"

    def num_written(self) -> int:
        """How many blocks from 0 on are there."""
        there = self._blocks()
        return next((block for block in range(len(self)) if block not in there), len(self))

    @property
    def num_blocks_there(self) -> int:
        """One more than the last block that is there, whatever is missing before it."""
        return max(self._blocks(), default=-1) + 1

    def cut(self, num_blocks: int) -> None:
        """Delete blocks from ``num_blocks`` on, and what a killed writer left half written.

        Raises:
            StorageError: a file cannot be deleted.
        """
        doomed = [path for block, path in self._blocks().items() if block >= num_blocks]
        doomed += self.path.glob(f"*{PARTIAL_SUFFIX}")
        try:
            for path in doomed:
                self._ops.unlink(path)
            if doomed:
                fsync_dir(self._ops, self.path)
        except OSError as error:
            raise from_os_error(error, "deleting latents", path=self.path) from error

    def write(self, block: int, latents_CFYX: Tensor) -> None:
        """Keep one block: float32 [C, F, Y, X] on any device. Durable on return.

        Raises:
            DiskFullError, StorageError: it is not kept.
        """
        raw = np.ascontiguousarray(latents_CFYX.cpu().numpy(), dtype="<f4").reshape(-1).view(np.uint8)
        trailer = as_bytes(crc32c(raw).to_bytes(_CRC_BYTES, "little"))
        path = self.chunk(block)
        try:
            write_file(self._ops, path, [raw, trailer])
            fsync_dir(self._ops, self.path)
        except OSError as error:
            raise from_os_error(error, "writing latents", path=path, block=block) from error

    def read(self, first: int, last: int) -> Tensor:
        """Blocks ``first`` to ``last - 1`` end to end: float32 [C, (last - first) * F, Y, X] on the CPU.

        Raises:
            StorageError: a block is missing or damaged; names it and its file.
        """
        return torch.cat([self._read(block) for block in range(first, last)], dim=1)

    def damages(self, num_blocks: int) -> Iterator[StorageError]:
        """One error for each of the first ``num_blocks`` blocks that is missing or damaged."""
        for block in range(num_blocks):
            try:
                self._read(block)
            except StorageError as error:
                yield error

    def _read(self, block: int) -> Tensor:
        path = self.chunk(block)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise StorageError("the latents of a block are missing", block=block, path=path) from error
        except OSError as error:
            raise StorageError(f"reading latents failed: {error.strerror}", block=block, path=path) from error
        size = 4 * math.prod(self._block_shape)
        if len(data) != size + _CRC_BYTES:
            what = f"{len(data)} bytes, not {size + _CRC_BYTES}"
            raise StorageError(f"the latents of a block are damaged: {what}", block=block, path=path)
        found, kept = crc32c(as_bytes(data[:size])), int.from_bytes(data[size:], "little")
        if found != kept:
            what = f"checksum {found:08x}, the file says {kept:08x}"
            raise StorageError(f"the latents of a block are damaged: {what}", block=block, path=path)
        return torch.from_numpy(np.frombuffer(data, dtype="<f4", count=size // 4).reshape(self._block_shape).copy())

    def _blocks(self) -> dict[int, Path]:
        found = {}
        for entry in os.scandir(self.path):
            parts = entry.name.split(".")
            if len(parts) == 6 and parts[0] == "c" and parts[1].isdecimal():
                found[int(parts[1])] = Path(entry.path)
        return found


def _array_shape(path: Path) -> tuple[int, ...]:
    try:
        shape: tuple[int, ...] = zarr.open_array(store=DurableStore(path, read_only=True), mode="r").shape
    except (KeyError, ValueError, OSError) as error:
        raise StorageError(f"the latent log's metadata cannot be read: {error}", path=path) from error
    if len(shape) != 5:
        raise StorageError(f"this is no log of latents: its shape is {shape}", path=path)
    return shape
