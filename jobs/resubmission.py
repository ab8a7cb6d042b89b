"""A film submitted to a directory that has one already: what is kept of it, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from longtake.jobs.ledger import LEDGER_NAME
from longtake.jobs.source import quote
from longtake.jobs.states import Task, TaskKind, resumed, retried
from longtake.jobs.status import State
from longtake.kernels.errors import ConfigError


def check_submission(directory: str, known: Mapping[str, Task], tasks: Sequence[Task]) -> None:
    """See that a film does not change what was begun.

    Raises:
        ConfigError: a shot that is rendered is gone, or one that was begun is rendered from something else.
    """
    named = {task.name for task in tasks}
    for name, old in known.items():
        if name not in named and old.leased:
            raise ConfigError(f"{directory}: the new film has no shot {quote(name)}, which is rendered; cancel it")
    for task in tasks:
        old_task = known.get(task.name)
        if old_task is None or task.kind is TaskKind.JOIN or old_task.recipe == task.recipe:
            continue
        if old_task.num_starts:
            raise ConfigError(
                f"{directory}: shot {quote(task.name)} was rendered from something else; undo the change, name "
                f"another --out, or remove {directory}/{task.name} and {LEDGER_NAME}"
            )


def taken_over(task: Task, old: Task | None) -> Task:
    """A task of a film submitted (again), with what an earlier submission reached."""
    if old is None:
        return task
    if old.recipe != task.recipe and (not old.leased or task.kind is TaskKind.JOIN):  # a joining loses its lease
        return dataclasses.replace(task, epoch=old.epoch)
    kept = dataclasses.replace(old, position=task.position, after=task.after)
    if old.state is State.DEAD and old.reason != "cancelled":
        return retried(kept)
    return resumed(kept) if old.state is State.PAUSED else kept
