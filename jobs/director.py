"""The director's mind: which gang renders which shot, over one ledger a film. No Ray, no threads, no clock of its own.

Every answer is on the disk before it is given, so the process may be killed at any instant and begun again from the
ledgers. Only in memory is when each gang was last heard of: after a restart all leases get their full time again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from longtake.jobs.ledger import LEDGER_NAME, FilmRecord
from longtake.jobs.openfilm import OpenFilm, open_ledger
from longtake.jobs.orders import Action, FilmView, Gang, Leave, Order, Publish, Verdict
from longtake.jobs.resubmission import check_submission, taken_over
from longtake.jobs.source import nearest, quote
from longtake.jobs.states import (
    Failure,
    FailureKind,
    Lease,
    Progress,
    Task,
    TaskKind,
    Want,
    ask,
    cancelled,
    depending,
    failed,
    finished,
    grant,
    paused,
    progressed,
    resumed,
    retried,
    stopped,
    waits_s,
)
from longtake.jobs.status import State
from longtake.kernels.errors import ConfigError, StorageError

LEASE_S = 15.0

log = logging.getLogger(__name__)

_ACTIONS: dict[Action, Callable[[Task], Task]] = {
    Action.PAUSE: paused,
    Action.RESUME: resumed,
    Action.CANCEL: cancelled,
    Action.RETRY: retried,
}


class Director:
    """Shots for gangs. Calls come from one thread at a time; each may write and fsync a ledger.

    Args:
        lease_s: a gang that was silent for so long has lost its shot.
        wall: seconds since 1970, kept in ledgers.
        clock: seconds that never go back, for leases.
        publish: told of every change of a film.
        progress_s: how long a task's mere progress may be in memory only; of states nothing is.
    """

    def __init__(
        self,
        *,
        lease_s: float = LEASE_S,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        publish: Publish = lambda view: None,
        progress_s: float = 0.0,
    ) -> None:
        self.lease_s = lease_s
        self._progress_s = progress_s
        self._wall, self._clock, self._publish = wall, clock, publish
        self._films: dict[str, OpenFilm] = {}
        self._idle: dict[str, tuple[Gang, float]] = {}
        self._starts: dict[str, list[str]] = {}  # incarnations by gang, in the order in which they were heard of
        self.hosts: Mapping[str, Sequence[int]] | None = None
        """Devices of each host, by kind; None: not known yet."""

    # Films

    def submit(self, directory: str, record: FilmRecord, tasks: Sequence[Task]) -> FilmView:
        """Take a film on, or go on with it: paused shots are resumed and dead ones tried again, cancelled ones not.

        Raises:
            ConfigError: the directory has shots of that name rendered from something else.
            StorageError: the ledger cannot be opened or written.
        """
        ledger = self._films[directory].ledger if directory in self._films else open_ledger(directory)
        try:
            check_submission(directory, ledger.tasks, tasks)
            old = ledger.film
            record = dataclasses.replace(record, submitted_s=old.submitted_s if old else self._wall())
            kept = [taken_over(task, ledger.tasks.get(task.name)) for task in tasks]
            ledger.take(record, kept)
        except BaseException:
            if directory not in self._films:
                ledger.close()
            raise
        film = self._films.get(directory) or OpenFilm(directory, ledger, record, self._clock())
        film.record = record
        self._films[directory] = film
        self._save(film, [])
        self._preempt()
        return film.view()

    def open(self, directory: str) -> None:
        """Read a film's ledger again after a restart; nothing if it is open.

        Raises:
            ConfigError: no film was ever submitted there.
        """
        if directory in self._films:
            return
        if not (Path(directory) / LEDGER_NAME).exists():
            raise ConfigError(f"{directory}: no film was submitted here; longtake submit FILM.toml --out {directory}")
        ledger = open_ledger(directory)
        if ledger.film is None:
            ledger.close()
            raise ConfigError(f"{directory}: no film was submitted here; longtake submit FILM.toml --out {directory}")
        self._films[directory] = film = OpenFilm(directory, ledger, ledger.film, self._clock())
        self._publish(film.view())

    def close(self, directory: str) -> None:
        """Let go of a film's ledger."""
        if (film := self._films.pop(directory, None)) is not None:
            film.ledger.close()

    def view(self, directory: str) -> FilmView:
        """The film as it stands."""
        return self._film(directory).view()

    def views(self) -> list[FilmView]:
        """All open films."""
        return [film.view() for film in self._films.values()]

    def control(self, directory: str, action: Action, shot: str | None = None) -> FilmView:
        """Pause, resume, cancel or retry one shot or the whole film.

        Raises:
            ConfigError: there is no such shot.
        """
        film = self._film(directory)
        tasks = film.ledger.tasks
        if shot is not None and shot not in tasks:
            raise ConfigError(f"there is no shot {quote(shot)}; {nearest(shot, list(tasks))}")
        names = [shot] if shot is not None else list(tasks)
        if shot is not None and action is Action.RETRY:
            names += [task.name for task in tasks.values() if task.kind is TaskKind.JOIN]
        self._save(film, [_ACTIONS[action](tasks[name]) for name in names])
        self._preempt()
        return film.view()

    # Gangs

    def next_order(self, gang: Gang) -> Order | Leave | None:
        """A task for a gang that has none. Asking again after a lost answer gives the same one.

        Returns:
            The order; None if there is nothing to do now; `Leave` if the gang's devices are wanted for another size, or
            if its workers were given up for dead and others have come in their place.
        """
        if self._is_replaced(gang):
            return Leave()
        for film, task in self._held(gang.name):
            if task.incarnation == gang.incarnation:
                return self._order(film, task, gang)
            message = "its worker died and was started anew"
            self._fail(film, task, Failure(kind=FailureKind.CRASH, signature="worker", message=message))
        misfit = False
        for film, task in self._ready():
            if not film.fits(gang):
                misfit |= self._can_be_held(film)
                continue
            if misfit and not self._others_fit(gang):
                return Leave()
            granted = grant(
                task, gang=gang.name, incarnation=gang.incarnation, num_devices=gang.num_devices, now_s=self._wall()
            )
            self._save(film, [granted])
            film.heard_s[task.name] = film.counted_s[task.name] = film.saved_s[task.name] = self._clock()
            self._idle.pop(gang.name, None)
            return self._order(film, granted, gang)
        if misfit and not self._others_fit(gang):
            return Leave()
        self._idle[gang.name] = (gang, self._clock())
        return None

    def _is_replaced(self, gang: Gang) -> bool:
        """Whether later workers of the gang have asked; were both served, each would take the other's lease."""
        starts = self._starts.setdefault(gang.name, [])
        holding = [task.incarnation for _, task in self._held(gang.name) if task.incarnation is not None]
        starts += [start for start in (*holding, gang.incarnation) if start not in starts]
        return starts[-1] != gang.incarnation

    def heartbeat(self, lease: Lease, progress: Progress) -> Verdict:
        """A gang works on its task."""
        held = self._leased(lease)
        if held is None:
            return Verdict.LOST
        film, task = held
        changed = progressed(task, progress, self._gpu_s(film, task))
        now = self._clock()
        if now - film.saved_s.get(task.name, -math.inf) >= self._progress_s:
            film.saved_s[task.name] = now
            self._save(film, [changed])
        else:
            film.ledger.hold(changed)
            self._publish(film.view())
        return Verdict.GO if changed.want is Want.RUN else Verdict.STOP

    def stopped(self, lease: Lease) -> bool:
        """A gang has stopped at a block boundary. False: the lease was lost before."""
        return self._end(lease, stopped)

    def finish(self, lease: Lease, video: str | None = None) -> bool:
        """A gang has finished its task. False: the lease was lost before."""
        return self._end(lease, lambda task: finished(task, video=video, now_s=self._wall()))

    def fail(self, lease: Lease, failure: Failure) -> bool:
        """A gang's try failed. False: the lease was lost before."""
        held = self._leased(lease)
        if held is None:
            return False
        film, task = held
        self._fail(film, task, failure)
        return True

    def gang_lost(self, name: str) -> bool:
        """A gang is known to be dead: its task is free at once. Returns whether it had one."""
        self._idle.pop(name, None)
        held = list(self._held(name))
        for film, task in held:
            self._give_up(film, task, "gang", f"gang {name} was lost")
        return bool(held)

    def reconcile(self, alive: Collection[str]) -> None:
        """Free the tasks of all gangs that are not alive, such as those of a cluster that is gone."""
        holders = {task.gang for film in self._films.values() for task in film.ledger.tasks.values() if task.gang}
        for name in (holders | set(self._idle)) - set(alive):
            self.gang_lost(name)
        self._starts = {name: starts for name, starts in self._starts.items() if name in alive}

    def tick(self) -> list[str]:
        """What time brings: silent gangs lose their tasks, higher priorities preempt.

        Returns:
            Names of the gangs that were silent too long; they should be killed.
        """
        now = self._clock()
        silent = []
        for film in self._films.values():
            for task in list(film.ledger.tasks.values()):
                if task.leased and now - film.heard_s[task.name] > self.lease_s:
                    silent.append(str(task.gang))
                    self._give_up(film, task, "silent", f"gang {task.gang} was silent for {self.lease_s:g} s")
        self._idle = {name: (gang, at) for name, (gang, at) in self._idle.items() if now - at <= self.lease_s}
        self._preempt()
        self._explain_waiting()
        return silent

    def demand(self) -> list[FilmRecord]:
        """The film's record for every task that runs or could run now, the most urgent first: what gangs are for."""
        running = [film.record for film in self._films.values() for task in film.ledger.tasks.values() if task.leased]
        return running + [film.record for film, _ in self._ready()]

    def next_wait_s(self) -> float | None:
        """Seconds until a task that waits after a failure may be tried again; None if there is none."""
        return min((wait_s for _, _, wait_s in self._waiting() if wait_s), default=None)

    # Inside

    def _film(self, directory: str) -> OpenFilm:
        self.open(directory)
        return self._films[directory]

    def _ready(self) -> list[tuple[OpenFilm, Task]]:
        """Tasks that could be given out now, by priority, then by the films' age, then in the film's order."""
        ready = [(film, task) for film, task, wait_s in self._waiting() if not wait_s]
        ready.sort(key=lambda pair: (-pair[0].record.priority, pair[0].record.submitted_s, pair[1].position))
        return ready

    def _waiting(self) -> list[tuple[OpenFilm, Task, float]]:
        """Tasks that wait for a gang, and the seconds until each may be tried."""
        now = self._wall()
        return [
            (film, task, waits_s(task, film.record.policy, now))
            for film in self._films.values()
            for task in film.ledger.tasks.values()
            if task.state is State.WAITING
        ]

    def _held(self, gang: str) -> Iterator[tuple[OpenFilm, Task]]:
        for film in self._films.values():
            for task in list(film.ledger.tasks.values()):
                if task.leased and task.gang == gang:
                    yield film, task

    def _leased(self, lease: Lease) -> tuple[OpenFilm, Task] | None:
        """The task of a lease that still holds; hears of its gang."""
        film = self._film(lease.film)
        task = film.ledger.tasks.get(lease.task)
        if task is None or not task.leased or task.epoch != lease.epoch or task.gang != lease.gang:
            return None
        film.heard_s[task.name] = self._clock()
        return film, task

    def _order(self, film: OpenFilm, task: Task, gang: Gang) -> Order:
        lease = Lease(film=film.directory, task=task.name, epoch=task.epoch, gang=gang.name)
        return Order(lease=lease, kind=task.kind, content_hash=film.record.content_hash, num_ranks=gang.num_devices)

    def _can_be_held(self, film: OpenFilm) -> bool:
        """Whether some host has enough devices for a gang of the film."""
        return self.hosts is None or film.record.gang_sizes[0] <= max(self.hosts.get(film.record.device, ()), default=0)

    def _explain_waiting(self) -> None:
        """Say of tasks that no host can hold what they wait for."""
        for film, task in self._ready():
            kind = {"cuda": "GPUs", "cpu": "CPUs"}[film.record.device]
            reason = None if self._can_be_held(film) else f"waits for a host with {film.record.gang_sizes[0]} {kind}"
            if reason != task.reason and (reason is not None or str(task.reason).startswith("waits for a host")):
                with _no_hold_up():
                    self._save(film, [dataclasses.replace(task, reason=reason)])

    def _others_fit(self, gang: Gang) -> bool:
        """Whether another idle gang could take the most urgent task, which this one cannot."""
        film = next(film for film, _ in self._ready() if self._can_be_held(film) and not film.fits(gang))
        return any(film.fits(other) for name, (other, _) in self._idle.items() if name != gang.name)

    def _gpu_s(self, film: OpenFilm, task: Task) -> float:
        """Device seconds since the last count, of which a silence counts as far as a lease lasts."""
        now = self._clock()
        spent = min(now - film.counted_s.get(task.name, now), self.lease_s)
        film.counted_s[task.name] = now
        return spent * task.num_devices

    def _end(self, lease: Lease, change: Callable[[Task], Task]) -> bool:
        held = self._leased(lease)
        if held is None:
            return False
        film, task = held
        spent = dataclasses.replace(task, gpu_s=task.gpu_s + self._gpu_s(film, task))
        self._save(film, [change(spent)])
        return True

    def _fail(self, film: OpenFilm, task: Task, failure: Failure) -> None:
        spent = dataclasses.replace(task, gpu_s=task.gpu_s + self._gpu_s(film, task))
        self._save(film, [failed(spent, failure, film.record.policy, self._wall())])

    def _give_up(self, film: OpenFilm, task: Task, signature: str, message: str) -> None:
        """Take a task from a gang that is not there any more."""
        with _no_hold_up():
            self._fail(film, task, Failure(kind=FailureKind.CRASH, signature=signature, message=message))

    def _save(self, film: OpenFilm, changed: Sequence[Task]) -> None:
        """Make tasks durable, with those that wait for them, and tell."""
        tasks = {**film.ledger.tasks, **{task.name: task for task in changed}}
        succeeded = {name for name, task in tasks.items() if task.state is State.SUCCEEDED}
        settled = [depending(task, ready=succeeded.issuperset(task.after)) for task in tasks.values()]
        film.ledger.save(settled)
        self._publish(film.view())

    def _preempt(self) -> None:
        """Ask for as many gangs as urgent tasks lack, from the least urgent shots; those begun last go first."""
        tasks = [task for film in self._films.values() for task in film.ledger.tasks.values()]
        num_free = len(self._idle) + sum(task.state is State.CHECKPOINT for task in tasks)
        urgent = [film for film, _ in self._ready() if self._can_be_held(film)]
        for film in urgent[num_free:]:
            running = [
                (other, task)
                for other in self._films.values()
                for task in other.ledger.tasks.values()
                if task.state is State.RUNNING
                and other.record.priority < film.record.priority
                and other.record.device == film.record.device
            ]
            if not running:
                return
            victim, task = min(running, key=lambda pair: (pair[0].record.priority, -(pair[1].started_s or 0)))
            with _no_hold_up():
                asked = dataclasses.replace(ask(task, Want.REQUEUE), reason=f"makes room for {film.record.title}")
                self._save(victim, [asked])


@contextlib.contextmanager
def _no_hold_up() -> Iterator[None]:
    """What nobody asked for: a film that cannot be written holds up no other, and its turn comes again."""
    try:
        yield
    except StorageError as error:
        log.warning("%s", error)
