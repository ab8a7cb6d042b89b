"""The Ray job of a film: ``python -m longtake.jobs.driver`` on the cluster. It follows the film to its end and prints.

What to do comes in one environment variable, as data: no shell sees a word of it. The job ends with 0 when film.mp4 is
there, 1 when shots are dead, 2 on bad input, and 3, with everything kept, when it is stopped.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

from longtake.jobs.budgets import check_budgets
from longtake.jobs.farm import start_director
from longtake.jobs.film import parse_film
from longtake.jobs.filmorder import FilmOrder, order_of_job
from longtake.jobs.gang import NAMESPACE, RayDirector
from longtake.jobs.ledger import FilmRecord
from longtake.jobs.orders import Action, FilmView, Outcome
from longtake.jobs.progress import LINE_INTERVAL_S
from longtake.jobs.quantities import format_duration
from longtake.jobs.render import RenderJob, make_directory
from longtake.jobs.resolve import resolve
from longtake.jobs.states import JOIN_NAME, Task, TaskKind
from longtake.jobs.status import State
from longtake.jobs.stopping import EXIT_INTERRUPTED, StopSignals
from longtake.kernels.errors import ConfigError, LongtakeError

FOLLOW_S = 1.0
PATIENCE_S = 120.0

Print = Callable[[str], None]


def film_tasks(record: FilmRecord, directory: str) -> list[Task]:
    """A film's tasks: its shots in the order of the film, then their joining.

    Raises:
        ConfigError: see `resolve` and `check_budgets`.
    """
    from longtake.engine.weights import read_spec

    film = parse_film(record.toml, record.source)
    configs = resolve(film, read_spec)
    check_budgets(film, configs, record.gang_sizes[0])
    job = RenderJob(film=film, configs=configs, directory=Path(directory), device=record.device)
    shots = [
        Task(
            name=shot.name,
            position=index,
            after=(shot.after,) if shot.after is not None else (),
            recipe=job.recipe(shot.name).content_hash,
            num_blocks=configs[shot.name].num_blocks,
            num_frames=configs[shot.name].num_frames,
            state=State.WAITING if shot.after is None else State.DEPEND,
        )
        for index, shot in enumerate(film.shots)
    ]
    join = Task(
        name=JOIN_NAME,
        kind=TaskKind.JOIN,
        position=len(shots),
        after=tuple(shot.name for shot in shots),
        recipe=hashlib.blake2b(" ".join(shot.recipe for shot in shots).encode(), digest_size=16).hexdigest(),
        state=State.DEPEND,
    )
    return [*shots, join]


def follow(order: FilmOrder, *, stop: Callable[[], bool], say: Print, interval_s: float = FOLLOW_S) -> int:
    """Submit a film to the cluster's director and wait for its end; returns the exit code.

    Args:
        stop: whether to pause the film and end.
        say: prints a line of progress.
    """
    make_directory(Path(order.directory))
    tasks = film_tasks(order.record, order.directory)
    start_director(order.options)
    director = RayDirector()
    view = _call(director, "submit", order.directory, order.record, tasks)
    teller = Teller(say)
    while view.outcome is Outcome.OPEN:
        teller.tell(view)
        if stop():
            return _pause(director, order.directory, say)
        time.sleep(interval_s)
        view = _call(director, "view", order.directory)
    teller.tell(view, is_last=True)
    _call(director, "release", order.directory)
    for task in view.tasks:
        if task.state is State.DEAD:
            say(f"{task.name} is dead: {task.reason}")
    return 0 if view.outcome is Outcome.DONE else 1


def _pause(director: RayDirector, directory: str, say: Print) -> int:
    """Stop all shots at their next block boundary and wait for it."""
    _call(director, "control", directory, Action.PAUSE, None)
    until = time.monotonic() + PATIENCE_S
    view = _call(director, "view", directory)
    while any(task.leased for task in view.tasks) and time.monotonic() < until:
        time.sleep(FOLLOW_S / 4)
        view = _call(director, "view", directory)
    _call(director, "release", directory)
    say("paused at a block boundary; submit the film again to go on")
    return EXIT_INTERRUPTED


def _call(director: RayDirector, method: str, *arguments: object) -> FilmView:
    """A call that waits for a director that is being restarted."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            view: FilmView = director.call(method, *arguments)
            return view
        except ConnectionError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


class Teller:
    """Prints changes of state at once, and a line of progress now and then, unless it says what the last one said."""

    def __init__(self, say: Print, clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._states: dict[str, State] = {}
        self._told, self._told_s = "", float("-inf")

    def tell(self, view: FilmView, *, is_last: bool = False) -> None:
        """Print what is new; at the end, the progress in any case."""
        for task in view.tasks:
            if self._states.get(task.name) is not task.state:
                reason = f" ({task.reason})" if task.reason else ""
                self._say(f"{task.name}: {task.state}{reason}")
                self._states[task.name] = task.state
        line, now = summary(view), self._clock()
        if is_last or (line != self._told and now - self._told_s >= LINE_INTERVAL_S):
            self._told, self._told_s = line, now
            self._say(line)


def summary(view: FilmView) -> str:
    """``Harbour 123/480 frames, 2 of 6 shots done, 4.1 fps, ETA 12s, 0.03 device hours``."""
    done, total = (sum(getattr(task, name) for task in view.shots) for name in ("frames_done", "num_frames"))
    num_done = sum(task.state is State.SUCCEEDED for task in view.shots)
    rate = sum(task.frames_per_s or 0 for task in view.shots)
    eta = f", {rate:.3g} fps, ETA {format_duration((total - done) / rate)}" if rate else ""
    hours = sum(task.gpu_s for task in view.tasks) / 3600
    shots = f"{num_done} of {len(view.shots)} shots done"
    return f"{view.film.title} {done}/{total} frames, {shots}{eta}, {hours:.3f} device hours"


def main() -> int:
    """Entry point of the job."""
    import ray

    order = order_of_job()
    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    with StopSignals() as signals:  # behind ray.init, which takes SIGTERM for itself: a job is stopped by it
        try:
            return follow(order, stop=signals.requested, say=lambda line: print(line, flush=True))
        except ConfigError as error:
            print(f"longtake: {error}", file=sys.stderr, flush=True)
            return 2
        except (LongtakeError, ConnectionError) as error:  # no director, or one that cannot use the film's ledger
            print(f"longtake: {error}", file=sys.stderr, flush=True)
            return 1


if __name__ == "__main__":
    sys.exit(main())
