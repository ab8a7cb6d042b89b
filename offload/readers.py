"""Disk reads in the order of their deadlines: threads of their own, so that they never wait behind writes."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any


class Readers:
    """A pool of threads that takes the job with the earliest deadline; equal ones in the order of submission."""

    def __init__(self, num_threads: int, on_start: Callable[[], None] = lambda: None) -> None:
        """Start the threads; each calls ``on_start`` first."""
        self._on_start = on_start
        self._ready = threading.Condition()
        self._jobs: list[tuple[float, int, Future[Any], Callable[[], Any]]] = []
        self._order = itertools.count()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"longtake-read-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, deadline: float, job: Callable[[], Any]) -> Future[Any]:
        """Queue a job; smaller deadlines go first. A closed pool cancels it."""
        future: Future[Any] = Future()
        with self._ready:
            if self._closed:
                future.cancel()
                return future
            heapq.heappush(self._jobs, (deadline, next(self._order), future, job))
            self._ready.notify()
        return future

    def close(self) -> None:
        """Cancel what has not begun and wait for what has."""
        with self._ready:
            self._closed = True
            waiting, self._jobs = self._jobs, []
            self._ready.notify_all()
        for _, _, future, _ in waiting:
            future.cancel()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        self._on_start()
        while True:
            with self._ready:
                while not self._jobs and not self._closed:
                    self._ready.wait()
                if self._closed:
                    return
                _, _, future, job = heapq.heappop(self._jobs)
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = job()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)


def when_all(futures: Sequence[Future[Any]], then: Callable[[BaseException | None], None]) -> None:
    """Call back once, from the last thread to finish, with the first error of any of the futures or None."""
    left = itertools.count(len(futures) - 1, -1)
    guard = threading.Lock()

    def finished(_: Future[Any]) -> None:
        with guard:
            remaining = next(left)
        if remaining == 0:
            errors = (CancelledRead() if one.cancelled() else one.exception() for one in futures)
            then(next((error for error in errors if error is not None), None))

    for future in futures:
        future.add_done_callback(finished)


class CancelledRead(Exception):
    """A read was given up because the cache was closed."""
