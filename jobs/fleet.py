"""How many gangs there should be, and how large: pure arithmetic over demand and devices."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longtake.jobs.ledger import FilmRecord

PREFIX = "gang"


@dataclass(frozen=True, slots=True, kw_only=True)
class Crewing:
    """A gang as its name tells it: ``gang-cuda-1-2-3f9a...`` is elastic from 1 to 2 GPUs.

    Args:
        device: "cpu" or "cuda".
        min_devices, num_devices: it starts and goes on with no fewer, and is given no more.
        key: tells it from others of its kind.
    """

    device: str
    min_devices: int
    num_devices: int
    key: str

    @property
    def name(self) -> str:
        """Of the actor."""
        return f"{PREFIX}-{self.device}-{self.min_devices}-{self.num_devices}-{self.key}"

    def fits(self, film: FilmRecord) -> bool:
        """Whether it can render a film's shots even at its smallest."""
        return self.device == film.device and self.num_devices >= film.gang_sizes[0]


def parse_name(name: str) -> Crewing | None:
    """The gang of an actor's name; None if it is no gang."""
    parts = name.split("-")
    if len(parts) != 5 or parts[0] != PREFIX or not (parts[2].isdecimal() and parts[3].isdecimal()):
        return None
    return Crewing(device=parts[1], min_devices=int(parts[2]), num_devices=int(parts[3]), key=parts[4])


def missing_gangs(
    demand: Sequence[FilmRecord], gangs: Sequence[Crewing], capacity: Mapping[str, int], max_gangs: int | None = None
) -> tuple[list[tuple[Crewing, FilmRecord]], list[FilmRecord]]:
    """Gangs to start so that every task has one, as far as there are devices.

    Args:
        demand: a record for every task that runs or could run, the most urgent first.
        gangs: those that exist.
        capacity: devices of the cluster by kind.
        max_gangs: no more than so many altogether.

    Returns:
        New gangs, each with the film that it is started for; and the records that no device is left for.
    """
    unassigned, started, lacking = list(gangs), list[tuple[Crewing, FilmRecord]](), list[FilmRecord]()
    used = {kind: sum(gang.num_devices for gang in gangs if gang.device == kind) for kind in capacity}
    for film in demand:
        fit = next((gang for gang in unassigned if gang.fits(film)), None)
        if fit is not None:
            unassigned.remove(fit)
            continue
        free = capacity.get(film.device, 0) - used.get(film.device, 0)
        size = max((size for size in film.gang_sizes if size <= free), default=None)
        if size is None or (max_gangs is not None and len(gangs) + len(started) >= max_gangs):
            lacking.append(film)
            continue
        least = _least(film.gang_sizes, size)
        new = Crewing(device=film.device, min_devices=least, num_devices=size, key=uuid.uuid4().hex[:12])
        started.append((new, film))
        used[film.device] = used.get(film.device, 0) + size
    return started, lacking


def _least(sizes: Sequence[int], size: int) -> int:
    """How far a gang of ``size`` may shrink and still have an allowed size at every step.

    One that may not, such as 4 of (1, 2, 4), waits for its devices instead and is replaced when that takes too long.
    """
    while size - 1 in sizes:
        size -= 1
    return size
