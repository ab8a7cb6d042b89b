"""What the director writes for others to read: DIR/status.json and DIR/director.log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from longtake.jobs.film import Film, parse_film
from longtake.jobs.orders import FilmView
from longtake.jobs.shotlog import DIRECTOR_LOG, write_line
from longtake.jobs.states import Task
from longtake.jobs.status import ShotStatus, State, StatusFile
from longtake.kernels.errors import LongtakeError

INTERVAL_S = 0.5

log = logging.getLogger(__name__)


class Publisher:
    """Writes the log at once and the status no more often than `INTERVAL_S`. A full disk is logged.

    Args:
        show: told of what is written, for metrics.
    """

    def __init__(self, show: Callable[[FilmView], None] = lambda view: None) -> None:
        self._show = show
        self._films: dict[str, tuple[str, Film]] = {}  # with the hash of its text
        self._states: dict[str, dict[str, State]] = {}
        self._late: dict[str, FilmView] = {}
        self._written_s: dict[str, float] = {}

    def note(self, view: FilmView) -> None:
        """A film has changed, or may have."""
        known = self._states.get(view.directory, {})
        states = {task.name: task.state for task in view.tasks}
        if states != known:
            for task in view.tasks:
                if known.get(task.name) is not task.state:
                    write_line(Path(view.directory) / DIRECTOR_LOG, describe(task, known.get(task.name)))
            self._states[view.directory] = states
        if time.monotonic() - self._written_s.get(view.directory, 0.0) >= INTERVAL_S:
            self._write(view)
        else:
            self._late[view.directory] = view

    def flush(self) -> None:
        """Write what was put off."""
        for view in list(self._late.values()):
            self._write(view)

    def forget(self, directory: str) -> None:
        """A film was let go of."""
        for known in (self._films, self._states, self._late, self._written_s):
            known.pop(directory, None)

    def _write(self, view: FilmView) -> None:
        self._late.pop(view.directory, None)
        self._written_s[view.directory] = time.monotonic()
        self._show(view)
        try:
            known, film = self._films.get(view.directory, (None, None))
            if film is None or known != view.film.content_hash:
                film = parse_film(view.film.toml, view.film.source)
                self._films[view.directory] = (view.film.content_hash, film)
            entries = {task.name: entry_of(task) for task in view.shots}
            StatusFile(Path(view.directory), film).update(entries)
        except LongtakeError as error:
            log.warning("no status was written: %s", error)


def describe(task: Task, before: State | None) -> str:
    """The line of a change in the log."""
    parts = [f"{task.name}: {f'{before} -> ' if before else ''}{task.state}"]
    if task.gang:
        parts.append(f"on {task.gang}, epoch {task.epoch}")
    if task.state in (State.WAITING, State.PAUSED, State.CHECKPOINT) and task.blocks_done:
        parts.append(f"after block {task.blocks_done}/{task.num_blocks}")
    if task.reason:
        parts.append(task.reason)
    return ", ".join(parts)


def entry_of(task: Task) -> ShotStatus:
    """A shot's entry in status.json."""
    rate = task.frames_per_s
    return ShotStatus(
        state=task.state,
        num_blocks=task.num_blocks,
        num_frames=task.num_frames,
        blocks_done=task.blocks_done,
        frames_done=task.frames_done,
        frames_per_s=rate,
        eta_s=(task.num_frames - task.frames_done) / rate if rate and task.leased else None,
        device_cache_bytes=task.device_bytes,
        host_cache_bytes=task.host_bytes,
        disk_cache_bytes=task.disk_bytes,
        stalled_s=task.stalled_s,
        gang=task.gang,
        num_starts=task.num_starts,
        gpu_hours=task.gpu_s / 3600,
        video=task.video,
        reason=task.reason,
    )
