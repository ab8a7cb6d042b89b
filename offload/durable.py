"""A zarr Store on local files whose values are on the disk when a write returns."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from longtake.offload.chunkfiles import ChunkFiles
from longtake.offload.files import fsync_dir


class DurableStore(LocalStore):
    """zarr's LocalStore, but a value is written to a partial file, fsynced, renamed, and its directory fsynced.

    zarr writes an array's metadata through it. The payloads' own path (`BlockStore`) writes the same files without
    zarr's copies, and fsyncs a directory once a block.

    Args:
        root: the folder.
        read_only: refuse to write.
        files: how whole files are moved, by the system's calls or by DeepNVMe; None: by the system's calls.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False, files: ChunkFiles | None = None) -> None:
        super().__init__(root, read_only=read_only)
        self.files = files or ChunkFiles()

    def with_read_only(self, read_only: bool = False) -> DurableStore:
        """The same folder with another mode."""
        return type(self)(self.root, read_only=read_only, files=self.files)

    def _put(self, key: str, value: Buffer) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        data = np.ascontiguousarray(value.as_numpy_array()).view(np.uint8).reshape(-1)
        self.files.write(path, [data])
        fsync_dir(self.files.ops, path.parent)

    async def set(self, key: str, value: Buffer) -> None:
        """Write a value durably."""
        if not self._is_open:
            await self._open()
        self._check_writable()
        await asyncio.to_thread(self._put, key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a value durably unless there is one."""
        if not (self.root / key).exists():
            await self.set(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write a value durably, without an event loop."""
        self._ensure_open_sync()
        self._check_writable()
        self._put(key, value)
