"""Chunk files, written whole or not at all and read in part: here by the system's calls, through the page cache.

`longtake.offload.deepnvme` has the other way. Both leave the same files.
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from longtake.offload.files import Bytes, FileOps, read_all, write_file


class DiskIO(enum.StrEnum):
    """How payloads reach the disk.

    SYSTEM: by the system's calls. AUTO: by DeepNVMe where DeepSpeed was installed with its async_io op, else by the
    system's calls. DEEPNVME: the op is built if need be.
    """

    AUTO = "auto"
    SYSTEM = "system"
    DEEPNVME = "deepnvme"


class WrongSizeError(Exception):
    """A file is longer or shorter than it must be."""


class ChunkFiles:
    """The system's calls. Any number of threads, each with files of its own."""

    name = "system"
    tells_errors = True
    """Whether a read that failed raises; else only a checksum tells."""

    def __init__(self, ops: FileOps | None = None) -> None:
        self.ops = ops or FileOps()

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory held for transfers."""
        return 0

    def close(self) -> None:
        """Give that memory back."""

    def write(self, path: Path, buffers: Sequence[Bytes]) -> None:
        """Write a file that appears under its name only when whole and fsynced; see `write_file`.

        The page cache keeps nothing of it: a history is written once, longer than memory, and read again, if at all,
        by plan; new pages for all of it cost more than the disk where a hypervisor lends memory page by page.

        Raises:
            OSError: as the system reports it.
        """
        write_file(self.ops, path, buffers, forget=True)

    def read(self, path: Path, buffers: Sequence[Bytes], offset: int, file_bytes: int) -> None:
        """Fill buffers, one after the other, from a file. The page cache keeps nothing of a file that is read whole.

        Args:
            offset: where the first begins.
            file_bytes: the size that the file must have.

        Raises:
            WrongSizeError: it has another.
            OSError: as the system reports it.
        """
        with self.reading(path, file_bytes) as fd:
            self.fill(fd, buffers, offset)
            if sum(buffer.size for buffer in buffers) == file_bytes:
                self.ops.forget(fd)  # one read in part, layer by layer, is read on

    def fill(self, fd: int, buffers: Sequence[Bytes], offset: int) -> None:
        """Fill buffers from an open file."""
        if read_all(self.ops, fd, buffers, offset) != sum(buffer.size for buffer in buffers):
            raise WrongSizeError("the file ended early")

    @contextlib.contextmanager
    def reading(self, path: Path, file_bytes: int) -> Iterator[int]:
        """A descriptor of a file of that size."""
        fd = self.ops.open(path, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            if size != file_bytes:
                raise WrongSizeError(f"the file has {size} bytes, not {file_bytes}")
            yield fd
        finally:
            self.ops.close(fd)
