"""How many gangs there should be, and how large: pure arithmetic over demand and the devices of each host."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from longtake.jobs.ledger import FilmRecord

PREFIX = "gang"


@dataclass(frozen=True, slots=True, kw_only=True)
class Crewing:
    """A gang as its name tells it: ``gang-cuda-1_2-3f9a...`` is one of 1 or 2 GPUs, as many as its host has for it.

    Args:
        device: "cpu" or "cuda".
        sizes: numbers of devices that it may have, ascending.
        key: tells it from others of its kind.
    """

    device: str
    sizes: tuple[int, ...]
    key: str

    @property
    def name(self) -> str:
        """Of the actor."""
        return f"{PREFIX}-{self.device}-{'_'.join(map(str, self.sizes))}-{self.key}"

    @property
    def num_devices(self) -> int:
        """The most that it takes."""
        return self.sizes[-1]

    def fits(self, film: FilmRecord) -> bool:
        """Whether it can render a film's shots, whatever its size is now."""
        return self.device == film.device and set(self.sizes) <= set(film.gang_sizes)


def parse_name(name: str) -> Crewing | None:
    """The gang of an actor's name; None if it is no gang."""
    parts = name.split("-")
    if len(parts) != 4 or parts[0] != PREFIX:
        return None
    sizes = parts[2].split("_")
    if not all(size.isdecimal() and int(size) for size in sizes):
        return None
    return Crewing(device=parts[1], sizes=tuple(map(int, sizes)), key=parts[3])


@dataclass(frozen=True, slots=True, kw_only=True)
class Muster:
    """What is to be done for the demand.

    Args:
        started: gangs to start, each with the film that it is started for.
        lacking: records that no device is left for.
    """

    started: tuple[tuple[Crewing, FilmRecord], ...]
    lacking: tuple[FilmRecord, ...]


def muster(
    demand: Sequence[FilmRecord],
    gangs: Sequence[Crewing],
    hosts: Mapping[str, Sequence[int]],
    max_gangs: int | None = None,
    silent: Collection[str] = (),
) -> Muster:
    """Gangs to start so that every task has one, as far as there are devices.

    A film that lacks devices keeps films of lower priority from starting gangs on them, if a host could ever hold it.

    Args:
        demand: a record for every task that runs or could run, the most urgent first.
        gangs: those that exist.
        hosts: devices of each host, by kind.
        max_gangs: no more than so many altogether.
        silent: names of gangs that said nothing for a while: they have their devices, and nothing is expected of them.
    """
    unassigned, started, lacking = (
        [gang for gang in gangs if gang.name not in silent],
        list[tuple[Crewing, FilmRecord]](),
        list[FilmRecord](),
    )
    free = {kind: _free(sizes, [gang for gang in gangs if gang.device == kind]) for kind, sizes in hosts.items()}
    kept: dict[str, int] = {}
    for film in demand:
        fit = next((gang for gang in unassigned if gang.fits(film)), None)
        if fit is not None:
            unassigned.remove(fit)
            continue
        room = free.get(film.device, [])
        sizes = [size for size in film.gang_sizes if size <= max(room, default=0)]
        is_kept = film.priority < kept.get(film.device, film.priority)
        if not sizes or is_kept or (max_gangs is not None and len(gangs) + len(started) >= max_gangs):
            lacking.append(film)
            if film.gang_sizes[0] <= max(hosts.get(film.device, ()), default=0):
                kept.setdefault(film.device, film.priority)
            continue
        most = sizes[-1]
        allowed = tuple(size for size in film.gang_sizes if size <= most)
        started.append((Crewing(device=film.device, sizes=allowed, key=uuid.uuid4().hex[:12]), film))
        _take(room, most)
    return Muster(started=tuple(started), lacking=tuple(lacking))


def _free(hosts: Sequence[int], gangs: Sequence[Crewing]) -> list[int]:
    """Devices left on each host if the gangs stand as tightly as they can."""
    free = list(hosts)
    for gang in sorted(gangs, key=lambda one: -one.num_devices):
        _take(free, gang.num_devices)
    return free


def _take(free: list[int], count: int) -> None:
    """Take devices from the fullest host that has so many; else what the emptiest has, whose gang has shrunk."""
    fitting = [index for index, left in enumerate(free) if left >= count]
    if fitting:
        free[min(fitting, key=lambda index: free[index])] -= count
    elif free:
        free[max(range(len(free)), key=lambda index: free[index])] = 0
