"""One process at a time in a folder: a lock that the system takes away from a dead owner."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import weakref
from pathlib import Path

from longtake.offload.errors import LockedError, from_os_error

_HELD: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """An exclusive flock on a file, held until `close` or the death of this process.

    A forked child would keep the lock of a dead parent alive: it closes its copy right after the fork.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock.

        Raises:
            LockedError: another process, or another lock object of this one, holds it.
            StorageError: the file cannot be made, or the storage has no locks.
        """
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise from_os_error(error, "opening the lock", path=path) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._fd, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(self._fd)
            if not isinstance(error, BlockingIOError):
                raise from_os_error(error, "locking the folder", path=path) from error
            raise LockedError(f"the folder is in use by {owner}; wait for it or stop it", path=path) from error
        with contextlib.suppress(OSError):  # a full disk has no room for a name, and the lock holds without one
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        _HELD.add(self)

    def close(self) -> None:
        """Let go; a second call does nothing."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
            self.forget()

    def forget(self) -> None:
        """Close this process's descriptor without touching the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            _HELD.discard(self)


def _forget_in_child() -> None:
    for lock in list(_HELD):
        lock.forget()


os.register_at_fork(after_in_child=_forget_in_child)
