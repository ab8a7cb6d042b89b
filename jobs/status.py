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
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.jobs.film import Film
from longtake.kernels.errors import StorageError
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
    """One shot's entry; ``device_cache_bytes`` and the rates are of the last block, ``reason`` says why it is DEAD."""

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
                entries = self._read_shots()
                entries.update({name: dataclasses.asdict(status) for name, status in shots.items()})
                self._write(entries)
        except OSError as error:
            raise StorageError(
                f"cannot write the status: {error.strerror}; make room or mend the rights", path=self.path
            ) from error

    def shots(self) -> dict[str, ShotStatus]:
        """This film's entries as they were last written; an entry that another version wrote is left out."""
        entries = {}
        for name, entry in self._read_shots().items():
            with suppress(TypeError, ValueError):
                entries[name] = ShotStatus(**{**entry, "state": State(entry["state"])})
        return entries

    def _read_shots(self) -> dict[str, Any]:
        """Entries of this film's shots; none when the file is of another film, format, or no JSON."""
        try:
            data = json.loads(self.path.read_text())
            names = {shot.name for shot in self._film.shots}
            if data["format"] == FORMAT and data["film"] == self._film.content_hash:
                return {name: entry for name, entry in data["shots"].items() if name in names}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            pass
        return {}

    def _write(self, entries: dict[str, Any]) -> None:
        ordered = {shot.name: entries[shot.name] for shot in self._film.shots if shot.name in entries}
        data = {
            "format": FORMAT,
            "title": self._film.title,
            "film": self._film.content_hash,
            "state": film_state([entry["state"] for entry in ordered.values()]),
            "video": FILM_NAME if self.path.with_name(FILM_NAME).exists() else None,
            "updated_s": time.time(),
            "shots": ordered,
        }
        write_file(FileOps(), self.path, [as_bytes(f"{json.dumps(data, indent=1)}\n".encode())])


def film_state(states: list[str]) -> State:
    """The film's state: that of the shot which needs most attention, and SUCCEEDED only when all are."""
    for state in (State.DEAD, State.CHECKPOINT, State.RUNNING, State.PAUSED, State.WAITING, State.DEPEND):
        if state in states:
            return state
    return State.SUCCEEDED
