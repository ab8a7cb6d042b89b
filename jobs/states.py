"""A shot's life on a farm, as pure functions from one frozen record to the next. No clock, no disk, no Ray.

::

    DEPEND --> WAITING --> RUNNING --> SUCCEEDED          (RUNNING and CHECKPOINT hold a lease)
                  ^           |
                  |           +--> CHECKPOINT (a stop was asked for) --> WAITING | PAUSED | DEAD | SUCCEEDED
                  +-----------+--> DEAD (failed too often; cancelled) --> WAITING by retry

A lease is (task, epoch, gang): the epoch rises with every grant, so a gang of an older one is known and refused.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass

from longtake.jobs.status import State

JOIN_NAME = "film.mp4"
"""Name of the task that joins the shots; no shot can have it."""


class TaskKind(enum.StrEnum):
    """What is to be done."""

    SHOT = "shot"
    JOIN = "join"


class Want(enum.StrEnum):
    """What becomes of a task that holds a lease, once its gang has stopped at a block boundary."""

    RUN = "run"
    REQUEUE = "requeue"
    PAUSE = "pause"
    CANCEL = "cancel"


class FailureKind(enum.StrEnum):
    """How a try ended."""

    ERROR = "error"  # the renderer said why
    CRASH = "crash"  # the worker or its gang was gone
    BUSY = "busy"  # an earlier process still holds the shot's folder: nothing was tried
    FULL = "full"  # the disk has no room: nothing is wrong with the shot, and trying again would cost for nothing


class TransitionError(Exception):
    """A transition that this state does not have; a mistake of the caller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failed try. Two are the same when kind and ``signature`` are."""

    kind: FailureKind
    signature: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When to try again, and when no more.

    Args:
        max_tries: failures in a row, without a new block between them, after which a shot is DEAD.
        max_same: failures in a row that the renderer explained in the same words, blocks between them or not.
        backoff_s: pause before the second try; it doubles with every further one.
        max_backoff_s: the longest.
    """

    max_tries: int = 10
    max_same: int = 3
    backoff_s: float = 2.0
    max_backoff_s: float = 300.0

    def delay_s(self, num_failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return float(min(self.max_backoff_s, self.backoff_s * 2.0 ** min(num_failures - 1, 60)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a gang tells about its shot. Bytes are of the shot's history by tier; ``stalled_s`` is since the start."""

    blocks_done: int = 0
    frames_done: int = 0
    frames_per_s: float | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    disk_bytes: int | None = None
    stalled_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to work on one task, in the film's directory ``film``, until a newer epoch is granted."""

    film: str
    task: str
    epoch: int
    gang: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One shot of a film, or the joining of them all, as the ledger keeps it.

    Args:
        after: names of the tasks that must have succeeded.
        recipe: hash of what it is rendered from; "" where that is not known.
        epoch: of the newest lease ever granted.
        gang, incarnation: who holds the lease: the gang, and which start of its workers.
        num_starts: leases granted.
        num_failures: failures since the last new block; ``num_same`` of them with this ``signature`` in a row.
        not_before_s: time (seconds since 1970) before which it is not tried again.
        gpu_s: seconds times devices spent.
    """

    name: str
    kind: TaskKind = TaskKind.SHOT
    position: int = 0
    after: tuple[str, ...] = ()
    recipe: str = ""
    num_blocks: int = 1
    num_frames: int = 1
    state: State = State.WAITING
    want: Want = Want.RUN
    epoch: int = 0
    gang: str | None = None
    incarnation: str | None = None
    num_devices: int = 0
    blocks_done: int = 0
    frames_done: int = 0
    frames_per_s: float | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    disk_bytes: int | None = None
    stalled_s: float | None = None
    num_starts: int = 0
    num_failures: int = 0
    num_same: int = 0
    signature: str | None = None
    not_before_s: float = 0.0
    reason: str | None = None
    gpu_s: float = 0.0
    started_s: float | None = None
    ended_s: float | None = None
    video: str | None = None

    @property
    def leased(self) -> bool:
        """Whether a gang works on it."""
        return self.state in (State.RUNNING, State.CHECKPOINT)

    @property
    def settled(self) -> bool:
        """Whether nothing more happens to it by itself."""
        return self.state in (State.SUCCEEDED, State.DEAD)


def grant(task: Task, *, gang: str, incarnation: str, num_devices: int, now_s: float) -> Task:
    """Give a waiting task to a gang."""
    _need(task, State.WAITING)
    return dataclasses.replace(
        task,
        state=State.RUNNING,
        want=Want.RUN,
        epoch=task.epoch + 1,
        gang=gang,
        incarnation=incarnation,
        num_devices=num_devices,
        num_starts=task.num_starts + 1,
        reason=None,
        started_s=task.started_s or now_s,
    )


def waits_s(task: Task, policy: RetryPolicy, now_s: float) -> float:
    """Seconds until a waiting task may be tried again; a clock that was set back makes them no more than the most."""
    left_s = task.not_before_s - now_s
    return left_s if 0 < left_s <= policy.max_backoff_s else 0.0


def progressed(task: Task, progress: Progress, gpu_s: float) -> Task:
    """Note where a gang is, and ``gpu_s`` more spent. A block more than ever before forgives the failures so far."""
    _need(task, State.RUNNING, State.CHECKPOINT)
    changed = dataclasses.replace(
        task,
        blocks_done=max(task.blocks_done, min(progress.blocks_done, task.num_blocks)),
        frames_done=max(task.frames_done, min(progress.frames_done, task.num_frames)),
        frames_per_s=progress.frames_per_s,
        device_bytes=progress.device_bytes,
        host_bytes=progress.host_bytes,
        disk_bytes=progress.disk_bytes,
        stalled_s=progress.stalled_s,
        gpu_s=task.gpu_s + gpu_s,
    )
    return dataclasses.replace(changed, num_failures=0) if changed.blocks_done > task.blocks_done else changed


def ask(task: Task, want: Want) -> Task:
    """Ask the holder to stop at its next block boundary, for a reason; cancelling outweighs pausing and requeueing."""
    _need(task, State.RUNNING, State.CHECKPOINT)
    if task.want is Want.CANCEL or (task.want is Want.PAUSE and want is Want.REQUEUE):
        return task
    return dataclasses.replace(task, state=State.CHECKPOINT, want=want)


def stopped(task: Task) -> Task:
    """The gang has stopped at a block boundary with everything kept."""
    _need(task, State.RUNNING, State.CHECKPOINT)
    return _after_lease(task)


def failed(task: Task, failure: Failure, policy: RetryPolicy, now_s: float) -> Task:
    """The try is over. It is repeated later unless there were too many, or it was to end anyway."""
    _need(task, State.RUNNING, State.CHECKPOINT)
    if task.want is Want.CANCEL:
        return _after_lease(task)
    if failure.kind is FailureKind.BUSY:
        released = _after_lease(task)
        return dataclasses.replace(released, not_before_s=now_s + policy.delay_s(1), reason=failure.message)
    if failure.kind is FailureKind.FULL:
        return dataclasses.replace(_after_lease(task), state=State.PAUSED, reason=failure.message)
    same = failure.kind is FailureKind.ERROR and task.signature == failure.signature
    num_same = (task.num_same + 1 if same else 1) if failure.kind is FailureKind.ERROR else 0
    counted = dataclasses.replace(
        _after_lease(task),
        num_failures=task.num_failures + 1,
        num_same=num_same,
        signature=failure.signature,
        not_before_s=now_s + policy.delay_s(task.num_failures + 1),
        reason=failure.message,
    )
    if num_same >= policy.max_same:
        return _dead(counted, f"failed the same way {num_same} times: {failure.message}")
    if counted.num_failures >= policy.max_tries:
        return _dead(counted, f"{counted.num_failures} tries without a new block: {failure.message}")
    return counted


def finished(task: Task, *, video: str | None, now_s: float) -> Task:
    """The video is in its place; whatever else was asked for comes too late."""
    _need(task, State.RUNNING, State.CHECKPOINT)
    return dataclasses.replace(
        _free(task),
        state=State.SUCCEEDED,
        blocks_done=task.num_blocks,
        frames_done=task.num_frames,
        num_failures=0,
        num_same=0,
        signature=None,
        reason=None,
        video=video,
        ended_s=now_s,
    )


def depending(task: Task, *, ready: bool) -> Task:
    """Settle WAITING or DEPEND by whether all that it comes after has succeeded; other states stay."""
    if task.state not in (State.WAITING, State.DEPEND):
        return task
    return dataclasses.replace(task, state=State.WAITING if ready else State.DEPEND)


def paused(task: Task) -> Task:
    """By a person's wish: at once, or at the next block boundary."""
    if task.leased:
        return ask(task, Want.PAUSE)
    if task.state in (State.WAITING, State.DEPEND):
        return dataclasses.replace(task, state=State.PAUSED)
    return task


def resumed(task: Task) -> Task:
    """Undo `paused`; a gang that is stopping already does so and begins again."""
    if task.want is Want.PAUSE and task.leased:
        return dataclasses.replace(task, want=Want.REQUEUE)
    if task.state is State.PAUSED:
        return dataclasses.replace(task, state=State.WAITING)
    return task


def cancelled(task: Task) -> Task:
    """Never to be finished, at once or at the next block boundary; what is rendered stays for `retried`."""
    if task.leased:
        return ask(task, Want.CANCEL)
    return task if task.settled else _dead(task, "cancelled")


def retried(task: Task) -> Task:
    """Bring a dead task back, as if it had never failed; shorten the wait of one that failed and waits."""
    if task.state is not State.DEAD and task.state is not State.WAITING:
        return task
    return dataclasses.replace(
        task,
        state=State.WAITING,
        want=Want.RUN,
        num_failures=0,
        num_same=0,
        signature=None,
        not_before_s=0.0,
        reason=None,
        ended_s=None,
    )


def _after_lease(task: Task) -> Task:
    free = _free(task)
    if task.want is Want.CANCEL:
        return _dead(free, "cancelled")
    return dataclasses.replace(free, state=State.PAUSED if task.want is Want.PAUSE else State.WAITING)


def _free(task: Task) -> Task:
    return dataclasses.replace(task, want=Want.RUN, gang=None, incarnation=None, num_devices=0, frames_per_s=None)


def _dead(task: Task, reason: str) -> Task:
    return dataclasses.replace(task, state=State.DEAD, reason=reason)


def _need(task: Task, *states: State) -> None:
    if task.state not in states:
        raise TransitionError(f"{task.name} is {task.state}, not {' or '.join(states)}")
