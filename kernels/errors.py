"""The project's errors: one root, and one group for each thing a caller can do about it.

They live in `kernels` because every other part may import it. Each group also inherits the standard library's type, so
`except OSError` keeps its meaning, and pickles, so an error crosses a process boundary whole.
"""

from __future__ import annotations

import os


class LongtakeError(Exception):
    """Root of every error raised on purpose.

    Args:
        message: what went wrong and what to do next, one sentence each.
        block: the block concerned, if one is.
        rank: the rank that raised it, if there are several.
        path: the file or folder concerned.
    """

    block: int | None
    rank: int | None
    path: str | None

    def __init__(
        self,
        message: str = "",
        *,
        block: int | None = None,
        rank: int | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(message)
        self.block = block
        self.rank = rank
        self.path = None if path is None else os.fspath(path)

    def __str__(self) -> str:
        message = str(self.args[0]) if self.args else ""
        where = [
            f"{name} {value}"
            for name, value in (("block", self.block), ("rank", self.rank), ("path", self.path))
            if value is not None
        ]
        return f"{message} ({', '.join(where)})" if where else message


class ConfigError(LongtakeError, ValueError):
    """The input is wrong: change the film, the configuration or the arguments."""


class CapacityError(LongtakeError, MemoryError):
    """A tier is full: give it more bytes, or keep less."""


class StorageError(LongtakeError, OSError):
    """What the disk holds is missing, torn or corrupt: verify the folder."""


class WorkerError(LongtakeError, RuntimeError):
    """A worker died or stopped answering: restart it from its last committed block."""
