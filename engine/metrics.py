"""metrics.jsonl of a shot: a line a block, in order, each block once, however often the shot was stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from longtake.offload.errors import from_os_error
from longtake.offload.files import FileOps, as_bytes, fsync_dir, write_all, write_file


class MetricsLog:
    """Appends lines; lines are whole or not there, though not on the disk at once. A context manager.

    Args:
        path: of the file; made if it is not there.
        num_blocks: of the shot that are committed: lines of later ones, which are rendered again, are cut.

    Raises:
        DiskFullError, StorageError: it cannot be written.
    """

    def __init__(self, path: Path, num_blocks: int) -> None:
        self._path, self._ops = path, FileOps()
        try:
            self._cut(num_blocks)
            self._fd = self._ops.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise from_os_error(error, "opening the metrics", path=path) from error

    def append(self, record: dict[str, Any]) -> None:
        """Add the line of a block, which the record names under "block", from 1 on.

        Raises:
            DiskFullError, StorageError: it cannot be written.
        """
        try:
            write_all(self._ops, self._fd, [as_bytes(json.dumps(record).encode() + b"\n")])
        except OSError as error:
            raise from_os_error(error, "writing metrics", path=self._path) from error

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ops.close(self._fd)

    def _cut(self, num_blocks: int) -> None:
        before = self._path.read_bytes() if self._path.exists() else b""
        kept: dict[int, bytes] = {}
        for line in before.splitlines(keepends=True):
            block = _block(line)
            if block is not None and block <= num_blocks:
                kept[block] = line
        after = b"".join(kept[block] for block in sorted(kept))
        if after != before:
            write_file(self._ops, self._path, [as_bytes(after)])
            fsync_dir(self._ops, self._path.parent)


def _block(line: bytes) -> int | None:
    """The block of a line; None for a torn one."""
    try:
        block = json.loads(line)["block"]
    except (ValueError, KeyError, TypeError):
        return None
    return block if line.endswith(b"\n") and isinstance(block, int) else None
