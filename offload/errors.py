"""Errors of the tiers that callers tell apart from their group."""

from __future__ import annotations

import errno
import os

from longtake.kernels.errors import CapacityError, ConfigError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT}


class DiskFullError(CapacityError):
    """The disk has no room: everything journaled is kept; free some space and run again."""


class LockedError(ConfigError):
    """Another process works in the folder: wait for it or stop it."""


class FencedError(StorageError):
    """A newer writer took the folder over: this one must stop."""


class MissingChunkError(StorageError):
    """A file that the journal lists is not there."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a disk without room."""
    while error is not None:
        if isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in _FULL):
            return True
        error = error.__cause__
    return False


def from_os_error(
    error: OSError, doing: str, *, path: str | os.PathLike[str], block: int | None = None
) -> DiskFullError | StorageError:
    """The error to raise for an operating-system error: a full disk is a matter of capacity, all else of storage."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return DiskFullError(
            f"the disk is full while {doing}: {reason}; free some space and run again, nothing journaled is lost",
            block=block,
            path=path,
        )
    return StorageError(f"{doing} failed: {reason}", block=block, path=path)
