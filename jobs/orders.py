"""What the director, gangs and people tell each other. Plain frozen data that pickles; no Ray."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longtake.jobs.ledger import FilmRecord
from longtake.jobs.states import Lease, Task, TaskKind
from longtake.jobs.status import State


class Verdict(enum.StrEnum):
    """What a gang is told about its lease."""

    GO = "go"
    STOP = "stop"  # at the next block boundary, then say so
    LOST = "lost"  # the lease is another's or nobody's: stop without a word, write nothing more


class Action(enum.StrEnum):
    """What a person can ask for."""

    PAUSE = "pause"
    RESUME = "resume"
    CANCEL = "cancel"
    RETRY = "retry"


class Outcome(enum.StrEnum):
    """Where a film is as a whole."""

    OPEN = "open"
    DONE = "done"
    FAILED = "failed"  # some shots are DEAD, and nothing else can be done without them


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """Ranks that render together. ``incarnation`` changes whenever its workers are started anew."""

    name: str
    incarnation: str
    device: str = "cpu"
    num_devices: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One task for a gang, on ``num_ranks`` of its ranks."""

    lease: Lease
    kind: TaskKind
    content_hash: str
    num_ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """To a gang: let the devices go, no shot wants a gang of this size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilmView:
    """A film as it stands, for people."""

    directory: str
    film: FilmRecord
    tasks: tuple[Task, ...]
    outcome: Outcome

    @property
    def shots(self) -> tuple[Task, ...]:
        """Its tasks without the joining."""
        return tuple(task for task in self.tasks if task.kind is TaskKind.SHOT)


Publish = Callable[[FilmView], None]


def outcome(tasks: Sequence[Task]) -> Outcome:
    """Where a film is as a whole."""
    if tasks and all(task.state is State.SUCCEEDED for task in tasks):
        return Outcome.DONE
    stuck = {task.name for task in tasks if task.state is State.DEAD}
    num_known = -1
    while len(stuck) > num_known:
        num_known = len(stuck)
        stuck |= {task.name for task in tasks if task.state is State.DEPEND and stuck.intersection(task.after)}
    is_open = any(task.state is not State.SUCCEEDED and task.name not in stuck for task in tasks)
    return Outcome.OPEN if is_open or not tasks else Outcome.FAILED
