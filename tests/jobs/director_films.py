"""Films, gangs and a clock for tests of the director."""

from __future__ import annotations

from pathlib import Path

from longtake.jobs.director import Director
from longtake.jobs.ledger import FilmRecord
from longtake.jobs.orders import Gang, Leave, Order
from longtake.jobs.states import JOIN_NAME, Task, TaskKind
from longtake.jobs.status import State

GANG = Gang(name="g1", incarnation="1")
OTHER = Gang(name="g2", incarnation="1")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def record(title: str = "film", *, priority: int = 0, sizes: tuple[int, ...] = (1,), max_tries: int = 5) -> FilmRecord:
    return FilmRecord(
        title=title,
        content_hash=title,
        toml="",
        source="film.toml",
        gang_sizes=sizes,
        priority=priority,
        max_tries=max_tries,
        backoff_s=1.0,
    )


def tasks_of(*after: int | None, recipe: str = "r") -> list[Task]:
    """Shots s0, s1, ...; each after the one of that number."""
    shots = [
        Task(
            name=f"s{index}",
            position=index,
            after=() if before is None else (f"s{before}",),
            num_blocks=4,
            num_frames=16,
            recipe=recipe,
            state=State.WAITING if before is None else State.DEPEND,
        )
        for index, before in enumerate(after)
    ]
    names = tuple(shot.name for shot in shots)
    join = Task(name=JOIN_NAME, kind=TaskKind.JOIN, position=len(shots), after=names, state=State.DEPEND)
    return [*shots, join]


def director(clock: Clock) -> Director:
    return Director(lease_s=10.0, wall=clock, clock=clock)


def film(tmp_path: Path, name: str = "film") -> str:
    (tmp_path / name).mkdir(exist_ok=True)
    return str(tmp_path / name)


def order(answer: Order | Leave | None) -> Order:
    assert isinstance(answer, Order)
    return answer


def states(mind: Director, directory: str) -> dict[str, State]:
    return {task.name: task.state for task in mind.view(directory).tasks}
