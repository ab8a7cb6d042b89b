"""Hosts that a cluster should rent for films that wait: tasks that need what gangs need, and end where they begin.

Ray's autoscaler starts hosts for tasks that wait, one by one as far as its limits go. Its own `request_resources` would
ask for all of them or, where they are more than the limits allow, for none. A cluster without an autoscaler lets the
tasks wait. They end with the director's process.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from longtake.jobs.ledger import FilmRecord

RESOURCES = {"cuda": "GPU", "cpu": "CPU"}
MAX_HOSTS = 64
PAUSE_S = 10.0

Room = tuple[str, int]  # kind of device, number on one host


class Rental:
    """The tasks that wait; used by one thread at a time."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[Any, Room] = {}
        self._pause_until = float("-inf")

    def ask(self, lacking: Sequence[FilmRecord], hosts: Mapping[str, Sequence[int]]) -> None:
        """Ask for room for gangs of films that no device is left for, and for no more.

        Where a task has ended there is room, perhaps for a gang that is being started: no task is added for a while.

        Args:
            lacking: a record for every gang that is lacking.
            hosts: devices of each host, by kind.

        Raises:
            ray.exceptions.RayError: the cluster is going away.
        """
        wanted = Counter(room_of(film, hosts) for film in lacking[:MAX_HOSTS])
        self._forget_ended()
        for task, room in list(self._waiting.items()):
            if wanted[room] > 0:
                wanted[room] -= 1
            else:
                del self._waiting[task]
                ray.cancel(task)
        if self._clock() >= self._pause_until:
            for room in wanted.elements():
                self._waiting[_wait_for(room)] = room

    def _forget_ended(self) -> None:
        if not self._waiting:
            return
        ended, _ = ray.wait(list(self._waiting), num_returns=len(self._waiting), timeout=0)
        for task in ended:
            del self._waiting[task]
            self._pause_until = self._clock() + PAUSE_S


def room_of(film: FilmRecord, hosts: Mapping[str, Sequence[int]]) -> Room:
    """What to ask for: the largest gang of a film that hosts like those that there are can hold, else the smallest."""
    most = max(hosts.get(film.device, ()), default=0)
    return RESOURCES[film.device], max((size for size in film.gang_sizes if size <= most), default=film.gang_sizes[0])


def _wait_for(room: Room) -> Any:
    kind, count = room
    devices = {"num_cpus": count} if kind == "CPU" else {"num_cpus": 0, "num_gpus": count}
    task: Any = ray.remote(_arrive)
    return task.options(**devices, max_retries=0).remote()


def _arrive() -> None:
    """There is room now."""
