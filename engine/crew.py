"""Worker processes that do tasks of one kind, each on a GPU of its own as long as there are enough.

A worker that fails may leave its GPU past using, so it ends, and another one takes the next task::

    run(tasks)      task -> pipe -> worker 0: make(0), then work(task) -> result -> pipe -> (task, result)
                                    worker 1: make(1), ...
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

from longtake.kernels.errors import WorkerError

Task = TypeVar("Task")
Result = TypeVar("Result")


class _Worker:
    """A process and this end of the pipe to it."""

    def __init__(self, index: int, make: Callable[[int], Callable[[Task], Result]]) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self.index = index
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, index, make), daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join()


class Crew(Generic[Task, Result]):
    """Some workers, started when they are first needed. To be closed; not thread-safe.

    Args:
        make: given a worker's number from 0 on, makes what does its tasks; pickled, as are tasks and results.
        size: processes; 0: everything is done in this one.
    """

    def __init__(self, make: Callable[[int], Callable[[Task], Result]], size: int) -> None:
        self._make, self._size = make, size
        self._idle: list[_Worker] = []
        self._busy: dict[Connection, tuple[_Worker, Task]] = {}
        self._here: Callable[[Task], Result] | None = None

    def __enter__(self) -> Crew[Task, Result]:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in (*self._idle, *(worker for worker, _ in self._busy.values())):
            worker.close()

    def run(self, tasks: Iterable[Task], at_once: int | None = None) -> Iterator[tuple[Task, Result | WorkerError]]:
        """Do tasks, begun in their order.

        Args:
            tasks: to be done; the next is asked for when there is a worker for it.
            at_once: at most; None: one a worker.

        Yields:
            Each with its result, or with what it failed of, as they end.
        """
        if not self._size:
            yield from ((task, self._do_here(task)) for task in tasks)
            return
        waiting, most = iter(tasks), min(self._size, at_once or self._size)
        while True:
            for task in islice(waiting, most - len(self._busy)):
                self._begin(task)
            if not self._busy:
                return
            for connection in wait(list(self._busy)):
                assert isinstance(connection, Connection)
                worker, task = self._busy.pop(connection)
                try:
                    result: Result | WorkerError = connection.recv()
                except (EOFError, OSError):
                    result = WorkerError("the process ended")
                if isinstance(result, WorkerError):
                    worker.close()
                else:
                    self._idle.append(worker)
                yield task, result

    def _begin(self, task: Task) -> None:
        self._idle.sort(key=lambda worker: -worker.index)
        if self._idle:
            worker = self._idle.pop()
        else:
            taken = {worker.index for worker, _ in self._busy.values()}
            worker = _Worker(min(set(range(self._size)) - taken), self._make)
        self._busy[worker.connection] = worker, task
        with suppress(OSError):  # it ended; receiving says so
            worker.connection.send(task)

    def _do_here(self, task: Task) -> Result | WorkerError:
        try:
            if self._here is None:
                self._here = self._make(0)
            return self._here(task)
        except Exception as error:
            return _failure(error)


def _serve(connection: Connection, index: int, make: Callable[[int], Callable[[Task], Result]]) -> None:
    """A worker's life: until its pipe is closed or a task fails."""
    work: Callable[[Task], Result] | None = None
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            work = work or make(index)
            result = work(task)
        except Exception as error:
            connection.send(_failure(error))
            return
        connection.send(result)


def _failure(error: Exception) -> WorkerError:
    traceback.print_exc()
    return WorkerError(f"{type(error).__name__}: {error}")
