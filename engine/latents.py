"""Clean latents of a shot on disk: what video, continuation and resume are made from.

Latents are small (a thousandth of the K/V they cause), and the VAE decoder's state follows from the last few of them
exactly, so they are kept for the whole shot and no decoder state ever is. A Zarr v3 array [block, C, F, Y, X] float32
with one crc32c'd chunk a block; a chunk is on the disk when :meth:`LatentLog.write` returns.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import BytesCodec, Crc32cCodec

from longtake.kernels.errors import StorageError


class LatentLog:
    """The latents of one shot; one writer, any readers.

    Args:
        path: of the array; made when it is not there.
        num_blocks: of the shot.
        block_shape: (C, F, Y, X) of a block.

    Raises:
        StorageError: what is there has another shape.
    """

    def __init__(self, path: Path, num_blocks: int, block_shape: tuple[int, int, int, int]) -> None:
        self._path = path
        shape = (num_blocks, *block_shape)
        if not (path / "zarr.json").exists():
            zarr.create_array(
                store=path,
                shape=shape,
                chunks=(1, *block_shape),
                dtype="float32",
                serializer=BytesCodec(),
                compressors=[Crc32cCodec()],
                fill_value=float("nan"),
                config={"write_empty_chunks": True},
            )
        array = zarr.open_array(store=path, mode="r+", config={"write_empty_chunks": True})
        if array.shape != shape:
            raise StorageError(f"{path} holds latents of shape {array.shape}, not {shape}; render again with --fresh")
        self._array = array

    @classmethod
    def existing(cls, path: Path) -> LatentLog:
        """The log of a shot that was rendered before."""
        num_blocks, *block_shape = zarr.open_array(store=path, mode="r").shape
        return cls(path, num_blocks, (block_shape[0], block_shape[1], block_shape[2], block_shape[3]))

    def __len__(self) -> int:
        """Blocks that the array has room for."""
        return int(self._array.shape[0])

    def num_written(self) -> int:
        """How many blocks from 0 on are there."""
        return next((block for block in range(len(self)) if not self._chunk(block).exists()), len(self))

    def write(self, block: int, latents_CFYX: Tensor) -> None:
        """Keep one block: float32 [C, F, Y, X] on any device. Durable on return."""
        self._array[block] = latents_CFYX.cpu().numpy()
        chunk = self._chunk(block)
        for path in (chunk, chunk.parent):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def read(self, first: int, last: int) -> Tensor:
        """Blocks ``first`` to ``last - 1`` end to end: float32 [C, (last - first) * F, Y, X] on the CPU.

        Raises:
            StorageError: a block is missing or damaged; names it and its file.
        """
        blocks = []
        for block in range(first, last):
            if not self._chunk(block).exists():
                raise StorageError(f"the latents of block {block} are missing: {self._chunk(block)}")
            try:
                blocks.append(torch.from_numpy(np.asarray(self._array[block])))
            except ValueError as error:
                where = self._chunk(block)
                raise StorageError(f"the latents of block {block} are damaged: {where}: {error}") from error
        return torch.cat(blocks, dim=1)

    def _chunk(self, block: int) -> Path:
        return self._path.joinpath("c", str(block), "0", "0", "0", "0")
