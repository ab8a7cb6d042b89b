"""Which hosts are asked for, without Ray."""

from __future__ import annotations

import pytest

pytest.importorskip("ray")

from longtake.jobs import rental
from longtake.jobs.ledger import FilmRecord
from longtake.jobs.rental import Rental, Room, room_of


def film(*sizes: int, device: str = "cuda") -> FilmRecord:
    return FilmRecord(title="t", content_hash="t", toml="", source="f", device=device, gang_sizes=sizes)


@pytest.mark.parametrize(
    ("sizes", "hosts", "number"),
    [((1, 2, 4), (), 1), ((1, 2, 4), (2, 3), 2), ((1, 2, 4), (8,), 4), ((4, 8), (2,), 4)],
)
def test_the_largest_gang_that_hosts_hold_else_the_smallest(
    sizes: tuple[int, ...], hosts: tuple[int, ...], number: int
) -> None:
    assert room_of(film(*sizes), {"cuda": hosts, "cpu": (64,)}) == ("GPU", number)
    assert room_of(film(*sizes, device="cpu"), {"cpu": hosts}) == ("CPU", number)


class Cluster:
    """As much of Ray as is used: tasks are numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting: dict[int, Room] = {}
        self.ended: set[int] = set()
        self.num_tasks, self.now = 0, 100.0
        monkeypatch.setattr(rental, "_wait_for", self.wait_for)
        monkeypatch.setattr("ray.cancel", self.waiting.pop)
        monkeypatch.setattr("ray.wait", lambda tasks, **how: ([one for one in tasks if one in self.ended], []))
        self.asking = Rental(clock=lambda: self.now)

    def wait_for(self, room: Room) -> int:
        self.num_tasks += 1
        self.waiting[self.num_tasks] = room
        return self.num_tasks

    def end(self, task: int) -> None:
        del self.waiting[task]
        self.ended.add(task)


def test_one_task_waits_for_each_gang_that_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    for _ in range(2):
        cluster.asking.ask([film(2), film(2), film(4)], {})
        assert sorted(cluster.waiting.values()) == [("GPU", 2), ("GPU", 2), ("GPU", 4)]
    cluster.asking.ask([film(4)], {})
    assert list(cluster.waiting.values()) == [("GPU", 4)]
    cluster.asking.ask([], {})
    assert not cluster.waiting


def test_nothing_is_added_while_a_gang_may_be_starting_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    cluster.asking.ask([film(2), film(2)], {})
    cluster.end(1)
    cluster.asking.ask([film(2), film(2)], {})
    assert list(cluster.waiting) == [2]
    cluster.now += rental.PAUSE_S
    cluster.asking.ask([film(2), film(2)], {})
    assert list(cluster.waiting) == [2, 3]
