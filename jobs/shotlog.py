"""DIR/<shot>.log and DIR/director.log: what happened to a shot and to a film, for people, on the run's own storage.

A cluster's dashboard forgets with the cluster; these stay. Lines are appended whole, so that several hosts' follow each
other, and are never read by the program.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

DIRECTOR_LOG = "director.log"


class ShotLog:
    """Appends to the log beside a shot's folder.

    Args:
        folder: DIR/<shot>; its log is DIR/<shot>.log.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder.with_name(f"{folder.name}.log")

    def write(self, text: str) -> None:
        """Add a line with the time; a disk that has no room for it must not stop a shot."""
        write_line(self.path, text)


def write_line(path: Path, text: str) -> None:
    """Append ``2026-11-21T09:40:39Z text`` in one write."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, f"{stamp} {text.rstrip()}\n".encode(errors="backslashreplace"))
        finally:
            os.close(fd)
