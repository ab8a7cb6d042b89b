"""The folder lock dies with its owner, and only then."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longtake.kernels.errors import StorageError
from longtake.offload.errors import LockedError
from longtake.offload.lock import FolderLock

_HOLDER = """
import os, sys, time
from pathlib import Path
from longtake.offload.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
if os.fork() == 0:
    print("held", flush=True)
    time.sleep(600)
    os._exit(0)
time.sleep(600)
"""


def test_second_owner_is_refused_by_name(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "lock")
    with pytest.raises(LockedError, match=f"process {os.getpid()}"):
        FolderLock(tmp_path / "lock")
    lock.close()
    lock.close()
    FolderLock(tmp_path / "lock").close()


def test_a_full_disk_has_room_for_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the owner's name is not in it."""

    def no_room(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", no_room)
    lock = FolderLock(tmp_path / "lock")
    with pytest.raises(LockedError, match="in use by another process"):
        FolderLock(tmp_path / "lock")
    lock.close()
    FolderLock(tmp_path / "lock").close()


def test_storage_without_locks_is_not_taken_for_an_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def no_locks(fd: int, how: int) -> None:
        opened.append(fd)
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(StorageError, match="locking the folder failed: No locks available"):
        FolderLock(tmp_path / "lock")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_killed_owner_frees_the_lock_even_with_a_child_alive(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path / "lock")],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {holder.pid}"):
            FolderLock(tmp_path / "lock")
        holder.kill()
        holder.wait()
        deadline = time.monotonic() + 120
        while True:
            try:
                FolderLock(tmp_path / "lock").close()
                break
            except LockedError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()
