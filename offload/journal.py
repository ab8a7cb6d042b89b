"""The journal: a block exists when its record is here.

    file    magic (8 bytes)  record  record  ...
    record  marker u32 | length u32 | epoch u32 | sequence u32 | crc32c u32 | body (JSON, `length` bytes)

All little-endian; the checksum covers length, epoch, sequence and body. A record is appended in one write and fsynced
before the next one, so a crash can only tear the last: an unreadable tail is cut on open. An unreadable record with a
readable one after it is damage, not a crash, and is refused.

Whoever opens the journal for writing raises the epoch. An older writer that still lives finds its next append refused,
and a record of an older epoch that slips in after a newer one is skipped by every reader.
"""

from __future__ import annotations

import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

from longtake.kernels.errors import StorageError
from longtake.offload.errors import FencedError, from_os_error
from longtake.offload.files import FileOps, as_bytes, crc32c, fsync_dir, write_all
from longtake.offload.records import Opened, Record, decode, encode

MAGIC = b"LTJRNL\x00\x01"
_MARKER = 0x4C54524A
_HEADER = struct.Struct("<IIIII")
_CHECKED = struct.Struct("<III")
_MAX_BODY_BYTES = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a journal file holds.

    Args:
        records: that count, in order.
        epoch: the newest seen; 0 in an empty journal.
        sequence: number of the last record, 0 when there is none.
        end_bytes: length of the readable part.
        torn_bytes: length of the unreadable tail.
        num_fenced: records skipped because a newer epoch had begun.
    """

    records: tuple[Record, ...]
    epoch: int
    sequence: int
    end_bytes: int
    torn_bytes: int
    num_fenced: int


def _frame(body: bytes, epoch: int, sequence: int) -> bytes:
    checked = _CHECKED.pack(len(body), epoch, sequence)
    return _HEADER.pack(_MARKER, len(body), epoch, sequence, crc32c(as_bytes(checked + body))) + body


def _parse(data: bytes, offset: int) -> tuple[int, int, bytes] | None:
    """Epoch, sequence and body of the record at an offset, or None if there is no whole one."""
    if offset + _HEADER.size > len(data):
        return None
    marker, length, epoch, sequence, crc = _HEADER.unpack_from(data, offset)
    first = offset + _HEADER.size
    if marker != _MARKER or length > _MAX_BODY_BYTES or first + length > len(data):
        return None
    body = data[first : first + length]
    if crc32c(as_bytes(_CHECKED.pack(length, epoch, sequence) + body)) != crc:
        return None
    return epoch, sequence, body


def _readable_after(data: bytes, offset: int) -> int | None:
    """Where a whole record begins after an offset, if one does."""
    marker = struct.pack("<I", _MARKER)
    found = data.find(marker, offset + 1)
    while found >= 0:
        if _parse(data, found) is not None:
            return found
        found = data.find(marker, found + 1)
    return None


def replay(path: Path) -> Replay:
    """Read a journal without changing it; a missing or empty one has no records.

    Raises:
        StorageError: it is damaged before its tail, is not a journal, or is of a newer version.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise from_os_error(error, "reading the journal", path=path) from error
    if data[: len(MAGIC)] != MAGIC:
        if MAGIC.startswith(data):
            return Replay(records=(), epoch=0, sequence=0, end_bytes=0, torn_bytes=len(data), num_fenced=0)
        if _readable_after(data, -1) is None and not data.strip(b"\x00"):
            return Replay(records=(), epoch=0, sequence=0, end_bytes=0, torn_bytes=len(data), num_fenced=0)
        raise StorageError("this is no journal of this version, or its first bytes are damaged", path=path)
    offset, epoch, sequence, num_fenced = len(MAGIC), 0, 0, 0
    records: list[Record] = []
    while (parsed := _parse(data, offset)) is not None:
        its_epoch, its_sequence, body = parsed
        record = decode(body)
        if isinstance(record, Opened) and its_epoch > epoch:
            epoch = its_epoch
        if its_epoch == epoch:
            records.append(record)
        else:
            num_fenced += 1
        sequence = its_sequence
        offset += _HEADER.size + len(body)
    good = _readable_after(data, offset)
    if good is not None:
        raise StorageError(
            f"the journal is damaged at byte {offset}, with readable records again from byte {good}: restore the file "
            f"from a copy, or start the shot afresh",
            path=path,
        )
    return Replay(
        records=tuple(records),
        epoch=epoch,
        sequence=sequence,
        end_bytes=offset,
        torn_bytes=len(data) - offset,
        num_fenced=num_fenced,
    )


class Journal:
    """A journal open for writing. `append` may be called from any thread and returns when the record is on the disk."""

    def __init__(self, path: Path, *, config_hash: str, ops: FileOps | None = None) -> None:
        """Replay, cut a torn tail, begin a new epoch.

        Args:
            path: the file; made if it is not there.
            config_hash: of the configuration that this writer runs with.
            ops: the system calls to use.

        Raises:
            StorageError: the journal is damaged or cannot be written.
            DiskFullError: no room for the opening record.
        """
        self.path = path
        self._ops = ops or FileOps()
        self._lock = threading.Lock()
        self._broken: str | None = None
        self.replayed = replay(path)
        self.epoch = self.replayed.epoch + 1
        self._sequence = self.replayed.sequence
        try:
            self._fd = self._ops.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise from_os_error(error, "opening the journal", path=path) from error
        try:
            self._end = self._begin()
            self.append(Opened(epoch=self.epoch, config_hash=config_hash))
            fsync_dir(self._ops, path.parent)
        except OSError as error:
            self._ops.close(self._fd)
            if isinstance(error, StorageError):
                raise
            raise from_os_error(error, "opening the journal", path=path) from error
        except BaseException:
            self._ops.close(self._fd)
            raise

    def _begin(self) -> int:
        if self.replayed.torn_bytes:
            self._ops.truncate(self._fd, self.replayed.end_bytes)
            self._ops.fsync(self._fd)
        if self.replayed.end_bytes:
            return self.replayed.end_bytes
        write_all(self._ops, self._fd, [as_bytes(MAGIC)])
        return len(MAGIC)

    def append(self, record: Record) -> None:
        """Add a record and wait until it is on the disk.

        Raises:
            FencedError: a newer writer has opened the journal.
            DiskFullError: no room; the journal is as before and a later append may succeed.
            StorageError: the disk failed; what it holds is unknown until the journal is opened again.
        """
        with self._lock:
            if self._broken is not None:
                raise StorageError(f"the journal cannot be written since: {self._broken}", path=self.path)
            if os.fstat(self._fd).st_size != self._end:
                self._broken = "a newer writer took it over"
                raise FencedError(f"epoch {self.epoch} ended: a newer writer took the journal over", path=self.path)
            data = as_bytes(_frame(encode(record), self.epoch, self._sequence + 1))
            try:
                write_all(self._ops, self._fd, [data])
            except OSError as error:
                self._take_back(str(error))
                raise from_os_error(error, "writing the journal", path=self.path) from error
            try:
                self._ops.fsync(self._fd)
            except OSError as error:
                self._broken = f"fsync failed: {error}"
                raise from_os_error(error, "forcing the journal to the disk", path=self.path) from error
            self._end += data.size
            self._sequence += 1

    def _take_back(self, reason: str) -> None:
        """Cut what a failed append left, or refuse all further ones."""
        try:
            self._ops.truncate(self._fd, self._end)
        except OSError:
            self._broken = reason

    def close(self) -> None:
        """Close the file; write a Closed record first to say that the run ended in order."""
        with self._lock:
            if self._fd >= 0:
                self._ops.close(self._fd)
                self._fd = -1
                self._broken = self._broken or "it was closed"
