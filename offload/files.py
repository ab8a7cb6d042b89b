"""Files that are whole and on the disk, or not there: the few system calls that the store and the journal use.

All of them go through a FileOps, so that tests can make any of them fail, fall short or take long.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from crc32c import crc32c as _crc32c

Bytes = npt.NDArray[np.uint8]
"""One-dimensional contiguous uint8; the unit of all disk I/O."""

PARTIAL_SUFFIX = ".partial"
_MAX_BUFFERS = 512


class FileOps:
    """The operating system, call by call. Stateless; any thread."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor that child processes do not inherit."""
        return os.open(path, flags | os.O_CLOEXEC, 0o644)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def write(self, fd: int, buffers: Sequence[Bytes]) -> int:
        """Write some of the buffers' bytes and return how many; it may be fewer than given."""
        return os.writev(fd, [buffer.data for buffer in buffers])

    def read(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """Read into buffers from an offset and return how many bytes came; 0 at the end of the file."""
        return os.preadv(fd, [buffer.data for buffer in buffers], offset)

    def fsync(self, fd: int) -> None:
        """Force a file or directory to the disk."""
        os.fsync(fd)

    def forget(self, fd: int) -> None:
        """Give back the page cache's memory of a file; what is not on the disk yet stays."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def truncate(self, fd: int, num_bytes: int) -> None:
        """Cut a file."""
        os.ftruncate(fd, num_bytes)

    def allocate(self, fd: int, num_bytes: int) -> None:
        """Take room for a file before it is written."""
        os.posix_fallocate(fd, 0, num_bytes)

    def written_bytes(self, fd: int) -> int:
        """How many bytes from the start of a file were written since they were allocated."""
        return os.lseek(fd, 0, os.SEEK_HOLE)

    def replace(self, source: Path, target: Path) -> None:
        """Rename, replacing the target in one step."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file; one that is not there is fine."""
        path.unlink(missing_ok=True)


def crc32c(data: Bytes, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of contiguous bytes, continued from `crc`; other threads go on meanwhile."""
    return _crc32c(data.data, crc)


def as_bytes(data: bytes) -> Bytes:
    """A read-only array over a bytes object."""
    return np.frombuffer(data, dtype=np.uint8)


def write_all(ops: FileOps, fd: int, buffers: Iterable[Bytes]) -> int:
    """Write all bytes of all buffers at the descriptor's position, however short each system call falls.

    Returns:
        Bytes written.

    Raises:
        OSError: a system call failed, or made no progress.
    """
    pending = _pending(buffers)
    total = 0
    while pending:
        written = ops.write(fd, _next(pending))
        if written <= 0:
            raise OSError(f"write made no progress after {total} bytes")
        total += written
        _advance(pending, written)
    return total


def read_all(ops: FileOps, fd: int, buffers: Iterable[Bytes], offset: int) -> int:
    """Fill buffers from an offset, stopping early only at the end of the file; returns the bytes read."""
    pending = _pending(buffers)
    done = 0
    while pending:
        got = ops.read(fd, _next(pending), offset + done)
        if got <= 0:
            break
        done += got
        _advance(pending, got)
    return done


def _pending(buffers: Iterable[Bytes]) -> list[Bytes]:
    """What is still to be moved, the next buffer last."""
    return [buffer for buffer in buffers if buffer.size][::-1]


def _next(pending: list[Bytes]) -> list[Bytes]:
    """The buffers of one system call."""
    return pending[-1 : -_MAX_BUFFERS - 1 : -1]


def _advance(pending: list[Bytes], num_bytes: int) -> None:
    """Take off what was moved."""
    while pending and num_bytes >= pending[-1].size:
        num_bytes -= pending.pop().size
    if num_bytes:
        pending[-1] = pending[-1][num_bytes:]


def write_file(ops: FileOps, path: Path, buffers: Iterable[Bytes], *, forget: bool = False) -> int:
    """Write a file that appears under its name only when whole and fsynced.

    Its directory entry is durable after a later `fsync_dir`. A failure leaves neither the file nor a partial one.

    Args:
        ops: the system calls to use.
        path: the file.
        buffers: its bytes.
        forget: give back the page cache's memory at once: the next file then gets pages that are there, not new ones.

    Returns:
        Bytes written.

    Raises:
        OSError: as the system reports it.
    """
    return make_file(ops, path, os.O_WRONLY, lambda fd: write_all(ops, fd, buffers), forget=forget)


def make_file(ops: FileOps, path: Path, flags: int, fill: Callable[[int], int], *, forget: bool = False) -> int:
    """As `write_file`; `fill` writes the bytes to a descriptor opened with `flags` and returns how many there are."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        fd = ops.open(partial, flags | os.O_CREAT | os.O_TRUNC)
        try:
            total = fill(fd)
            ops.fsync(fd)
            if forget:
                ops.forget(fd)  # after the fsync: pages that are not written yet would stay
        finally:
            ops.close(fd)
        ops.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to be told
            ops.unlink(partial)
        raise
    return total


def fsync_dir(ops: FileOps, path: Path) -> None:
    """Make the names in a directory durable."""
    fd = ops.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        ops.fsync(fd)
    finally:
        ops.close(fd)
