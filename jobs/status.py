"""DIR/status.json: how far each shot of a film is, for people and for other tools.

Written whole and renamed into place, so a reader never sees half a file. Several processes may render shots of one film
in one directory: each changes its own shots' entries, one process at a time, under a lock that dies with its owner.

    {"format": 1, "title": "Harbour", "film": "<content hash>", "state": "RUNNING", "video": null,
     "updated_s": 1735689600.0,
     "shots": {"arrival": {"state": "RUNNING", "num_blocks": 7, ...}, "quay": {"state": "DEPEND", ...}}}
"""

from __future__ import annotations

import dataclasses
import enum
import fcntl
import json
import math
import time
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.jobs.film import Film
from longtake.jobs.source import nearest, quote
from longtake.kernels.errors import ConfigError, LongtakeError, StorageError
from longtake.offload.files import FileOps, as_bytes, write_file

FORMAT = 1
FILM_NAME = "film.mp4"
STATUS_NAME = "status.json"
_LOCK_NAME = ".status.lock"


class State(enum.StrEnum):
    """Where a shot is; the words that render farms use."""

    WAITING = "WAITING"
    DEPEND = "DEPEND"  # waits for the shot it starts from
    RUNNING = "RUNNING"
    CHECKPOINT = "CHECKPOINT"  # a stop was asked for: the block is being finished and kept
    PAUSED = "PAUSED"  # stopped, and goes on when rendered again
    SUCCEEDED = "SUCCEEDED"
    DEAD = "DEAD"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShotStatus:
    """One shot's entry; ``device_cache_bytes`` and, while it is rendered, the rates are of the last block.

    ``reason`` says why it is DEAD, or why it waits.
    """

    state: State
    num_blocks: int
    num_frames: int
    blocks_done: int = 0
    frames_done: int = 0
    frames_per_s: float | None = None
    eta_s: float | None = None
    device_cache_bytes: int | None = None
    video: str | None = None
    reason: str | None = None
    # on a cluster only
    host_cache_bytes: int | None = None
    disk_cache_bytes: int | None = None
    stalled_s: float | None = None
    gang: str | None = None
    num_starts: int | None = None
    gpu_hours: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FilmStatus:
    """The whole file.

    Args:
        title, film: the film's title and content hash.
        state: of the film, see `film_state`.
        video: its name in the directory, once it is there.
        updated_s: seconds since 1970.
        shots: by name, in the film's order.
    """

    title: str
    film: str
    state: State
    video: str | None
    updated_s: float
    shots: Mapping[str, ShotStatus]

    def to_json(self) -> dict[str, Any]:
        """As written to the file."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def read_status(directory: Path, shot: str | None = None) -> FilmStatus:
    """The status of a film's directory, of one shot only if one is named.

    Raises:
        ConfigError: there is none, it is of another format, or there is no such shot.
        StorageError: it is damaged.
    """
    try:
        status = _read(directory / STATUS_NAME)
    except FileNotFoundError as error:
        raise ConfigError(f"{directory}: nothing was rendered here (no {STATUS_NAME})") from error
    if shot is None:
        return status
    if shot not in status.shots:
        raise ConfigError(f"there is no shot {quote(shot)}; {nearest(shot, list(status.shots))}")
    return dataclasses.replace(status, shots={shot: status.shots[shot]})


def _read(path: Path) -> FilmStatus:
    """Read the file; what a newer version adds within the format is left out."""
    try:
        data = json.loads(path.read_bytes())
        if data["format"] != FORMAT:
            hint = "use the version that rendered it, or render or submit again to write it anew"
            raise ConfigError(f"{path} is of format {quote(data['format'])}, this longtake reads {FORMAT}; {hint}")
        shots = {str(name): ShotStatus(**_checked(ShotStatus, entry)) for name, entry in data["shots"].items()}
        return FilmStatus(**{**_checked(FilmStatus, data), "shots": shots})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise StorageError("the status is damaged; rendering or submitting again writes it anew", path=path) from error


def _checked(kind: type, data: Any) -> dict[str, Any]:
    """The values of a dataclass's fields in JSON.

    Raises:
        ValueError, TypeError: one is of another type.
    """
    hints, values = typing.get_type_hints(kind), {}
    for name, hint in hints.items():
        if name in data and name != "shots":
            value = State(data[name]) if hint is State else data[name]
            is_whole = type(value) is int and hint in (float, float | None)  # JSON's 5 may have been 5.0
            if not (is_whole or isinstance(value, hint)) or (isinstance(value, float) and not math.isfinite(value)):
                raise TypeError(f"{name} = {value!r}")
            values[name] = value
    return values


class StatusFile:
    """The status of one film in its output directory.

    Args:
        directory: DIR of ``longtake render --out DIR``.
        film: its title, hash and shots' order are written with every change.
    """

    def __init__(self, directory: Path, film: Film) -> None:
        self.path = directory / STATUS_NAME
        self._lock_path = directory / _LOCK_NAME
        self._film = film

    def update(self, shots: Mapping[str, ShotStatus]) -> None:
        """Change some shots' entries, and the film's state with them. Blocks while another process does the same.

        Args:
            shots: new entries by name; the others stay as they are.

        Raises:
            StorageError: the directory is not writable or full.
        """
        try:
            with open(self._lock_path, "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._write({**self.shots(), **shots})
        except OSError as error:
            raise StorageError(
                f"cannot write the status: {error.strerror}; make room or mend the rights", path=self.path
            ) from error

    def shots(self) -> dict[str, ShotStatus]:
        """This film's entries as they were last written; none when the file is of another film or cannot be read."""
        try:
            status = _read(self.path)
        except (FileNotFoundError, LongtakeError):
            return {}
        if status.film != self._film.content_hash:
            return {}
        return {shot.name: status.shots[shot.name] for shot in self._film.shots if shot.name in status.shots}

    def _write(self, entries: Mapping[str, ShotStatus]) -> None:
        ordered = {shot.name: entries[shot.name] for shot in self._film.shots if shot.name in entries}
        status = FilmStatus(
            title=self._film.title,
            film=self._film.content_hash,
            state=film_state([entry.state for entry in ordered.values()]),
            video=FILM_NAME if self.path.with_name(FILM_NAME).exists() else None,
            updated_s=time.time(),
            shots=ordered,
        )
        write_file(FileOps(), self.path, [as_bytes(f"{json.dumps(status.to_json(), indent=1)}\n".encode())])


def film_state(states: Collection[State]) -> State:
    """The film's state: that of the shot which needs most attention, and SUCCEEDED only when all are."""
    for state in (State.DEAD, State.CHECKPOINT, State.RUNNING, State.PAUSED, State.WAITING, State.DEPEND):
        if state in states:
            return state
    return State.SUCCEEDED
