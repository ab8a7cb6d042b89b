"""System calls that fail on demand."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from longtake.offload.files import Bytes, FileOps


class FaultyOps(FileOps):
    """Real system calls, of which some fail, fall short, flip a bit or take long.

    Args:
        free_bytes: room until writes say ENOSPC; None: endless.
        short: most bytes that one write or read moves; None: all.
        write_delay_s: time that each write takes.

    Attributes:
        may_write: writes wait until it is set.
    """

    def __init__(self, *, free_bytes: int | None = None, short: int | None = None, write_delay_s: float = 0.0) -> None:
        self.free_bytes = free_bytes
        self.short = short
        self.write_delay_s = write_delay_s
        self.fail_fsync = False
        self.fail_reads = 0
        self.fail_writes = 0
        self.num_writes = 0
        self.may_write = threading.Event()
        self.may_write.set()
        self._lock = threading.Lock()

    def take_time(self) -> None:
        """What a write does first."""
        time.sleep(self.write_delay_s)
        assert self.may_write.wait(100), "whoever was to let writes go on waits for one"

    def write(self, fd: int, buffers: Sequence[Bytes]) -> int:
        self.take_time()
        with self._lock:
            self.num_writes += 1
            if self.fail_writes:
                self.fail_writes -= 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            room = self.free_bytes
            if room is not None and room <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            most = min(x for x in (self.short, room, 1 << 62) if x is not None)
            data = b"".join(buffer.tobytes() for buffer in buffers)[:most]
            written = os.write(fd, data)
            if self.free_bytes is not None:
                self.free_bytes -= written
            return written

    def read(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        with self._lock:
            if self.fail_reads:
                self.fail_reads -= 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(fd, buffers if self.short is None else [buffers[0][: self.short]], offset)

    def allocate(self, fd: int, num_bytes: int) -> None:
        if self.free_bytes is not None and num_bytes > self.free_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().allocate(fd, num_bytes)

    def fsync(self, fd: int) -> None:
        if self.fail_fsync:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fsync(fd)


class Unsynced(FileOps):
    """Real system calls that force nothing to the disk: for many openings in tests in which no machine dies."""

    def fsync(self, fd: int) -> None:
        pass


def flip_bit(path: Path, bit: int) -> None:
    """Turn one bit of a file over."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(bytes(data))
