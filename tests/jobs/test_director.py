"""The director's decisions, with a clock of the test's own."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import pytest

from longtake.jobs.ledger import FilmRecord, Ledger
from longtake.jobs.orders import Action, Gang, Leave, Outcome, Verdict
from longtake.jobs.states import JOIN_NAME, Failure, FailureKind, Lease, Progress, Task, TaskKind
from longtake.jobs.status import State
from longtake.kernels.errors import ConfigError, StorageError
from tests.jobs.director_films import GANG, OTHER, Clock, director, film, order, record, states, tasks_of


def test_shots_wait_for_each_other_and_the_film_for_all(tmp_path: Path) -> None:
    mind, where = director(Clock()), film(tmp_path)
    mind.submit(where, record(), tasks_of(None, 0))
    first = order(mind.next_order(GANG))
    assert first.lease.task == "s0"
    assert mind.next_order(OTHER) is None
    assert mind.finish(first.lease, "s0/s0.mp4")
    second = order(mind.next_order(OTHER))
    assert second.lease.task == "s1"
    assert mind.next_order(GANG) is None
    assert mind.finish(second.lease)
    join = order(mind.next_order(GANG))
    assert (join.kind, join.lease.task) == (TaskKind.JOIN, JOIN_NAME)
    assert mind.view(where).outcome is Outcome.OPEN
    assert mind.finish(join.lease, JOIN_NAME)
    assert mind.view(where).outcome is Outcome.DONE


def test_a_lost_answer_is_given_again(tmp_path: Path) -> None:
    mind, where = director(Clock()), film(tmp_path)
    mind.submit(where, record(), tasks_of(None, None))
    assert mind.next_order(GANG) == mind.next_order(GANG)
    assert order(mind.next_order(OTHER)).lease.task == "s1"


def test_a_gang_back_from_the_dead_is_refused(tmp_path: Path) -> None:
    clock = Clock()
    mind, where = director(clock), film(tmp_path)
    mind.submit(where, record(), tasks_of(None))
    old = order(mind.next_order(GANG)).lease
    clock.now += 11
    assert mind.tick() == ["g1"]
    clock.now += 2  # the pause before the second try
    new = order(mind.next_order(OTHER)).lease
    assert new.epoch == old.epoch + 1
    assert mind.heartbeat(old, Progress(blocks_done=3)) is Verdict.LOST
    assert not mind.finish(old)
    assert not mind.fail(old, Failure(kind=FailureKind.ERROR, signature="x", message="x"))
    assert not mind.stopped(old)
    assert mind.heartbeat(new, Progress(blocks_done=1)) is Verdict.GO
    assert mind.view(where).tasks[0].blocks_done == 1


def test_a_worker_started_anew_goes_on_with_its_shot(tmp_path: Path) -> None:
    clock = Clock()
    mind, where = director(clock), film(tmp_path)
    mind.submit(where, record(), tasks_of(None))
    old = order(mind.next_order(GANG)).lease
    again = Gang(name="g1", incarnation="2")
    assert mind.next_order(again) is None
    clock.now += 1.5
    new = order(mind.next_order(again)).lease
    assert (new.task, new.epoch) == (old.task, old.epoch + 1)
    assert mind.view(where).tasks[0].num_failures == 1
    # the old worker was cut off, not dead: it hears that its lease is lost, and must not take the new one's
    assert mind.heartbeat(old, Progress(blocks_done=1)) is Verdict.LOST
    assert isinstance(mind.next_order(GANG), Leave)
    assert mind.heartbeat(new, Progress(blocks_done=2)) is Verdict.GO


def test_a_director_that_came_back_knows_which_worker_is_the_newer(tmp_path: Path) -> None:
    clock = Clock()
    mind, where = director(clock), film(tmp_path)
    mind.submit(where, record(), tasks_of(None))
    order(mind.next_order(GANG))
    mind.close(where)
    mind = director(clock)
    mind.submit(where, record(), tasks_of(None))
    clock.now += 1.5
    again = Gang(name="g1", incarnation="2")
    mind.next_order(again)
    assert isinstance(mind.next_order(GANG), Leave)
    clock.now += 1.5
    assert order(mind.next_order(again)).lease.epoch == 2


def test_a_higher_priority_takes_a_gang_at_a_block_boundary(tmp_path: Path) -> None:
    clock = Clock()
    mind, low, high = director(clock), film(tmp_path, "low"), film(tmp_path, "high")
    mind.submit(low, record("low"), tasks_of(None, None))
    first = order(mind.next_order(GANG)).lease
    clock.now += 1
    second = order(mind.next_order(OTHER)).lease
    mind.submit(high, record("high", priority=5), tasks_of(None))
    assert mind.heartbeat(first, Progress()) is Verdict.GO
    assert mind.heartbeat(second, Progress(blocks_done=1)) is Verdict.STOP, "the one begun last goes"
    assert states(mind, low)["s1"] is State.CHECKPOINT
    mind.tick()
    assert mind.heartbeat(first, Progress()) is Verdict.GO, "one is enough"
    assert mind.stopped(second)
    urgent = order(mind.next_order(OTHER)).lease
    assert urgent.film == high
    assert states(mind, low)["s1"] is State.WAITING
    mind.finish(urgent)
    order(mind.next_order(OTHER))  # joins the urgent film
    low_task = mind.view(low).tasks[1]
    assert (low_task.num_failures, low_task.blocks_done, low_task.reason) == (0, 1, "makes room for high")
    assert order(mind.next_order(Gang(name="g3", incarnation="1"))).lease == dataclasses.replace(
        second, epoch=second.epoch + 1, gang="g3"
    )
    assert mind.view(low).tasks[1].reason is None


def test_an_idle_gang_makes_preemption_needless(tmp_path: Path) -> None:
    mind, low, high = director(Clock()), film(tmp_path, "low"), film(tmp_path, "high")
    mind.submit(low, record("low"), tasks_of(None))
    first = order(mind.next_order(GANG)).lease
    assert mind.next_order(OTHER) is None
    mind.submit(high, record("high", priority=5), tasks_of(None))
    assert mind.heartbeat(first, Progress()) is Verdict.GO
    assert order(mind.next_order(OTHER)).lease.film == high


def test_pause_resume_cancel_retry(tmp_path: Path) -> None:
    mind, where = director(Clock()), film(tmp_path)
    mind.submit(where, record(), tasks_of(None, 0, None))
    lease = order(mind.next_order(GANG)).lease
    mind.control(where, Action.PAUSE)
    assert states(mind, where) == dict(
        zip(["s0", "s1", "s2", JOIN_NAME], [State.CHECKPOINT, State.PAUSED, State.PAUSED, State.PAUSED], strict=True)
    )
    assert mind.heartbeat(lease, Progress(blocks_done=2)) is Verdict.STOP
    assert mind.stopped(lease)
    assert mind.next_order(GANG) is None
    mind.control(where, Action.RESUME)
    assert states(mind, where)["s1"] is State.DEPEND
    mind.control(where, Action.CANCEL, "s0")
    assert mind.view(where).tasks[0].reason == "cancelled"
    assert order(mind.next_order(GANG)).lease.task == "s2"
    assert mind.view(where).outcome is Outcome.OPEN
    mind.finish(Lease(film=where, task="s2", epoch=1, gang="g1"))
    assert mind.view(where).outcome is Outcome.FAILED
    mind.control(where, Action.RETRY, "s0")
    again = order(mind.next_order(GANG)).lease
    assert (again.task, mind.view(where).tasks[0].blocks_done) == ("s0", 2)
    with pytest.raises(ConfigError, match='did you mean "s2"'):
        mind.control(where, Action.PAUSE, "s22")


def test_a_poison_shot_stops_costing(tmp_path: Path) -> None:
    clock = Clock()
    mind, where = director(clock), film(tmp_path)
    mind.submit(where, record(), tasks_of(None, 0))
    for _ in range(3):
        lease = order(mind.next_order(GANG)).lease
        clock.now += 5
        assert mind.fail(lease, Failure(kind=FailureKind.ERROR, signature="oom", message="no memory"))
        clock.now += 600
    assert mind.next_order(GANG) is None
    view = mind.view(where)
    assert view.tasks[0].state is State.DEAD
    assert view.tasks[0].gpu_s == pytest.approx(15.0)
    assert view.outcome is Outcome.FAILED
    assert mind.demand() == []


def test_everything_gone_and_submitted_again(tmp_path: Path) -> None:
    clock = Clock()
    mind, where = director(clock), film(tmp_path)
    mind.submit(where, record(), tasks_of(None, 0, None))
    mind.finish(order(mind.next_order(GANG)).lease, "s0/s0.mp4")
    held = order(mind.next_order(GANG)).lease
    mind.heartbeat(held, Progress(blocks_done=3))
    mind.close(where)  # as a killed process does
    mind = director(clock)
    mind.submit(where, record(), tasks_of(None, 0, None))
    mind.reconcile([])
    clock.now += 2
    task = order(mind.next_order(OTHER)).lease.task
    assert task == held.task
    view = mind.view(where)
    assert (view.tasks[0].state, view.tasks[0].video, view.tasks[1].blocks_done) == (
        State.SUCCEEDED,
        "s0/s0.mp4",
        3,
    )
    assert mind.heartbeat(held, Progress()) is Verdict.LOST


def test_a_changed_film_keeps_what_is_the_same(tmp_path: Path) -> None:
    mind, where = director(Clock()), film(tmp_path)
    mind.submit(where, record(), tasks_of(None, None))
    lease = order(mind.next_order(GANG)).lease
    mind.submit(where, record(priority=3), tasks_of(None, None, None))
    assert mind.heartbeat(lease, Progress()) is Verdict.GO
    assert list(states(mind, where)) == ["s0", "s1", "s2", JOIN_NAME]
    with pytest.raises(ConfigError, match="rendered from something else"):
        mind.submit(where, record(), tasks_of(None, None, recipe="new"))
    with pytest.raises(ConfigError, match="no shot"):
        mind.submit(where, record(), [task for task in tasks_of(None, None) if task.name != "s0"])
    assert mind.view(where).film.priority == 3


def test_gangs_of_the_wrong_size_leave(tmp_path: Path) -> None:
    mind, where = director(Clock()), film(tmp_path)
    mind.submit(where, record(sizes=(2, 4)), tasks_of(None, None))
    assert isinstance(mind.next_order(GANG), Leave)
    pair = order(mind.next_order(Gang(name="pair", incarnation="1", num_devices=2)))
    assert pair.num_ranks == 2
    assert isinstance(mind.next_order(Gang(name="cuda", incarnation="1", device="cuda", num_devices=4)), Leave)


def test_a_film_that_no_host_can_hold_stops_nobody_and_says_so(tmp_path: Path) -> None:
    mind, big, small = director(Clock()), film(tmp_path, "big"), film(tmp_path, "small")
    mind.hosts = {"cpu": [2, 2]}
    mind.submit(big, record("big", sizes=(4,), priority=9), tasks_of(None))
    mind.submit(small, record("small"), tasks_of(None))
    first = order(mind.next_order(GANG)).lease
    assert first.film == small
    mind.tick()
    assert mind.heartbeat(first, Progress()) is Verdict.GO
    assert mind.view(big).tasks[0].reason == "waits for a host with 4 CPUs"
    mind.hosts = {"cpu": [2, 4]}
    mind.tick()
    assert mind.view(big).tasks[0].reason is None
    assert mind.heartbeat(first, Progress()) is Verdict.STOP


def test_a_clock_that_was_set_back_keeps_no_shot_waiting(tmp_path: Path) -> None:
    clock = Clock()
    mind, where = director(clock), film(tmp_path)
    mind.submit(where, record(), tasks_of(None))
    for kind in (FailureKind.CRASH, FailureKind.BUSY):
        lease = order(mind.next_order(GANG)).lease
        mind.fail(lease, Failure(kind=kind, signature="x", message="x"))
        assert mind.next_order(GANG) is None
        clock.now -= 30 * 24 * 3600
        assert mind.next_wait_s() is None
    order(mind.next_order(GANG))


def test_a_shot_added_while_the_film_is_joined_comes_into_it(tmp_path: Path) -> None:
    mind, where = director(Clock()), film(tmp_path)
    mind.submit(where, record(), tasks_of(None))
    mind.finish(order(mind.next_order(GANG)).lease)
    join = order(mind.next_order(GANG)).lease
    assert join.task == JOIN_NAME
    *shots, last = tasks_of(None, None)
    mind.submit(where, record(), [*shots, dataclasses.replace(last, recipe="both")])
    assert not mind.finish(join, JOIN_NAME), "it is without the new shot"
    assert states(mind, where) == {"s0": State.SUCCEEDED, "s1": State.WAITING, JOIN_NAME: State.DEPEND}
    mind.finish(order(mind.next_order(GANG)).lease)
    again = order(mind.next_order(GANG)).lease
    assert (again.task, again.epoch) == (JOIN_NAME, join.epoch + 1)


def test_a_submission_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mind, where = director(Clock()), film(tmp_path)
    mind.submit(where, record(), tasks_of(None, None))
    before = mind.view(where)
    plain, num_rows, allowed = Ledger._insert, 0, 0

    def insert(self: Ledger, table: str, row: Task | FilmRecord) -> None:
        nonlocal num_rows
        num_rows += 1
        if num_rows > allowed:
            raise sqlite3.OperationalError("database or disk is full")
        plain(self, table, row)

    for count in range(3):
        num_rows, allowed = 0, count
        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "_insert", insert)
            with pytest.raises(StorageError, match="disk is full"):
                mind.submit(where, record(priority=7), tasks_of(None, None, None)[1:])
        assert mind.view(where) == before
    mind.close(where)
    assert mind.view(where) == before


def test_a_ledger_that_cannot_be_written_holds_up_no_other_film(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    mind, bad, good = director(clock), film(tmp_path, "bad"), film(tmp_path, "good")
    for where, gang in ((bad, GANG), (good, OTHER)):
        mind.submit(where, record(where), tasks_of(None))
        order(mind.next_order(gang))
    plain = Ledger.save

    def save(self: Ledger, tasks: Iterable[Task]) -> None:
        if self.path.parent.name == "bad":
            raise StorageError("the ledger cannot be written: disk I/O error", path=self.path)
        plain(self, tasks)

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "save", save)
        clock.now += 11
        assert mind.tick() == ["g1", "g2"]
        assert (states(mind, bad)["s0"], states(mind, good)["s0"]) == (State.RUNNING, State.WAITING)
        mind.reconcile([])
    mind.tick()
    assert states(mind, bad)["s0"] is State.WAITING, "it is tried again"


def test_a_directory_without_a_film(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no film was submitted"):
        director(Clock()).view(str(tmp_path))
