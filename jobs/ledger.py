"""DIR/ledger.sqlite: all that the director knows about one film, so that it can die at any instruction.

One row a task with a column a field of `Task`, and one row for the film; what happened is in DIR/director.log. A change
is on the disk before anyone hears of it: WAL, synchronous=FULL, one transaction a change.

One writer: the file is opened in SQLite's exclusive mode, which needs no memory shared between processes and therefore
works on network storage too. A second director waits and then fails; a dead one's lock goes with its process. Everybody
else reads DIR/status.json.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from longtake.jobs.states import RetryPolicy, Task
from longtake.kernels.errors import ConfigError, StorageError

LEDGER_NAME = "ledger.sqlite"

_VERSION = 1
_MEND = "move it away and submit the film again: what is rendered stays"
_SQL_TYPES: dict[object, str] = {int: "INTEGER", float: "REAL", bool: "INTEGER"}
_Row = TypeVar("_Row", bound="Task | FilmRecord")


@dataclass(frozen=True, slots=True, kw_only=True)
class FilmRecord:
    """A film as it was submitted.

    Args:
        title, content_hash: of the film.
        toml, source: its text, and the path it was read from (model folders are meant from there).
        device: "cpu" or "cuda", that its gangs render on.
        gang_sizes: devices that a shot may be rendered on, ascending.
        priority: a higher one goes first and takes gangs away from lower ones.
        submitted_s: seconds since 1970.
    """

    title: str
    content_hash: str
    toml: str
    source: str
    device: str = "cpu"
    gang_sizes: tuple[int, ...] = (1,)
    priority: int = 0
    max_tries: int = RetryPolicy().max_tries
    max_same: int = RetryPolicy().max_same
    backoff_s: float = RetryPolicy().backoff_s
    submitted_s: float = 0.0

    @property
    def policy(self) -> RetryPolicy:
        """When its shots are tried again."""
        return RetryPolicy(max_tries=self.max_tries, max_same=self.max_same, backoff_s=self.backoff_s)


class Ledger:
    """One film's ledger, open for its only writer. Used by one thread at a time.

    Args:
        path: the file; made if it is not there.
        wait_s: how long to wait for a writer that is on its way out.

    Raises:
        ConfigError: it is of another version of longtake.
        StorageError: another director has it, or it cannot be read.
    """

    def __init__(self, path: Path, *, wait_s: float = 5.0) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(path, timeout=wait_s, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise StorageError(f"the ledger cannot be opened: {error}", path=path) from error
        try:
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")  # before WAL, so that there is no shared memory
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._prepare()
            self.film = self._load_film()
            self.tasks = self._load_tasks()
        except sqlite3.Error as error:
            self._db.close()
            if "locked" in str(error):
                raise StorageError("another director writes this film's ledger; stop it first", path=path) from error
            raise StorageError(f"the ledger cannot be read: {error}; {_MEND}", path=path) from error
        except ConfigError:
            self._db.close()
            raise
        except (ValueError, TypeError) as error:
            self._db.close()
            raise StorageError(f"the ledger holds what no longtake wrote: {error!r}; {_MEND}", path=path) from error
        except BaseException:
            self._db.close()
            raise

    film: FilmRecord | None
    """None until there is one."""
    tasks: dict[str, Task]
    """As on the disk, by name, in the film's order."""

    def take(self, film: FilmRecord, tasks: Iterable[Task]) -> None:
        """Set or replace the film and its tasks, all or nothing, and forget those that it does not have.

        Raises:
            StorageError: nothing was changed.
        """
        wanted = {task.name: task for task in sorted(tasks, key=lambda task: task.position)}
        with self._transaction():
            self._db.execute("DELETE FROM film")
            self._insert("film", film)
            gone = [(name,) for name in self.tasks if name not in wanted]
            self._db.executemany("DELETE FROM task WHERE name = ?", gone)
            self._write(task for task in wanted.values() if self.tasks.get(task.name) != task)
        self.film, self.tasks = film, wanted

    def save(self, tasks: Iterable[Task]) -> None:
        """Make tasks durable, all or none.

        Raises:
            StorageError: nothing was changed.
        """
        changed = [task for task in tasks if self.tasks.get(task.name) != task]
        if not changed:
            return
        with self._transaction():
            self._write(changed)
        self.tasks.update((task.name, task) for task in changed)
        if any(task.position != index for index, task in enumerate(self.tasks.values())):
            self.tasks = dict(sorted(self.tasks.items(), key=lambda item: item[1].position))

    def _write(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            self._insert("task", task)

    def hold(self, task: Task) -> None:
        """Take a task's progress into memory; it reaches the disk with the task's next `save`."""
        self.tasks[task.name] = task

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def _prepare(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            message = (
                f"the ledger is of version {version}, this longtake reads {_VERSION}; use the newer one, or {_MEND}"
            )
            raise ConfigError(message, path=self.path)
        with self._transaction():
            self._db.execute(f"CREATE TABLE IF NOT EXISTS film ({_columns(FilmRecord)})")
            self._db.execute(f"CREATE TABLE IF NOT EXISTS task ({_columns(Task)}, PRIMARY KEY (name))")
            self._db.execute(f"PRAGMA user_version={_VERSION}")
        for table, kind in (("film", FilmRecord), ("task", Task)):
            there = {row[1] for row in self._db.execute(f"PRAGMA table_info({table})")}
            if there != {field.name for field in dataclasses.fields(kind)}:
                raise ConfigError(f"the ledger is of another version of longtake; {_MEND}", path=self.path)

    def _load_film(self) -> FilmRecord | None:
        rows = self._rows("film")
        return _from_row(FilmRecord, rows[0]) if rows else None

    def _load_tasks(self) -> dict[str, Task]:
        tasks = [_from_row(Task, row) for row in self._rows("task")]
        return {task.name: task for task in sorted(tasks, key=lambda task: task.position)}

    def _rows(self, table: str) -> list[dict[str, Any]]:
        cursor = self._db.execute(f"SELECT * FROM {table}")
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def _insert(self, table: str, record: Task | FilmRecord) -> None:
        row = _to_row(record)
        marks = ", ".join("?" for _ in row)
        self._db.execute(
            f"INSERT OR REPLACE INTO {table} ({', '.join(_quoted(row))}) VALUES ({marks})", [*row.values()]
        )

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db, self.path)


class _Transaction:
    """BEGIN IMMEDIATE ... COMMIT, or ROLLBACK; SQLite's errors become a StorageError."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self._db, self._path = db, path

    def __enter__(self) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise self._error(error) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            try:
                self._db.execute("COMMIT")
            except sqlite3.Error as failure:
                self._roll_back()
                raise self._error(failure) from failure
            return
        self._roll_back()
        if isinstance(error, sqlite3.Error):
            raise self._error(error) from error

    def _roll_back(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _error(self, error: sqlite3.Error) -> StorageError:
        if "locked" in str(error):
            return StorageError("another director writes this film's ledger; stop it first", path=self._path)
        return StorageError(f"the ledger cannot be written: {error}; make room or mend the disk", path=self._path)


def _quoted(names: Iterable[str]) -> list[str]:
    """Column names, quoted: ``after`` is a word of SQL."""
    return [f'"{name}"' for name in names]


def _columns(kind: type) -> str:
    hints = typing.get_type_hints(kind)
    return ", ".join(
        f"{name} {_SQL_TYPES.get(_plain(hints[field.name]), 'TEXT')}"
        for field, name in zip(dataclasses.fields(kind), _quoted(f.name for f in dataclasses.fields(kind)), strict=True)
    )


def _to_row(record: Task | FilmRecord) -> dict[str, Any]:
    """A value a field; tuples as JSON."""
    return {
        field.name: json.dumps(value) if isinstance(value := getattr(record, field.name), tuple) else value
        for field in dataclasses.fields(record)
    }


def _from_row(kind: type[_Row], row: Mapping[str, Any]) -> _Row:
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in row.items():
        plain = _plain(hints[name])
        if value is None:
            values[name] = None
        elif typing.get_origin(plain) is tuple:
            values[name] = tuple(json.loads(value))
        else:
            values[name] = plain(value)
    return kind(**values)


def _plain(hint: Any) -> Any:
    """The type without ``| None``."""
    if isinstance(hint, types.UnionType):
        return next(option for option in typing.get_args(hint) if option is not type(None))
    return hint
