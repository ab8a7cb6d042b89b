"""The director's decisions, with a clock of the test's own, and a state machine of films, gangs, deaths and wishes."""

from __future__ import annotations

import dataclasses
import sqlite3
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from longtake.jobs.director import Director
from longtake.jobs.ledger import FilmRecord, Ledger
from longtake.jobs.orders import Action, Gang, Leave, Order, Outcome, Verdict
from longtake.jobs.states import JOIN_NAME, Failure, FailureKind, Lease, Progress, Task, TaskKind
from longtake.jobs.status import State
from longtake.kernels.errors import ConfigError, StorageError

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
    assert (low_task.num_failures, low_task.blocks_done) == (0, 1)


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

    def save(self: Ledger, tasks: Iterable[Task], *, at_s: float, event: str = "") -> None:
        if self.path.parent.name == "bad":
            raise StorageError("the ledger cannot be written: disk I/O error", path=self.path)
        plain(self, tasks, at_s=at_s, event=event)

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


class Farm(RuleBasedStateMachine):
    """Two films with dependencies, three gangs that obey, die, come back, or talk of leases long lost."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.root = tempfile.TemporaryDirectory()
        root = Path(self.root.name)
        self.films = [film(root, "a"), film(root, "b")]
        self.shapes: list[Sequence[int | None]] = [(None, 0, 0, None), (None, 0)]
        self.mind = director(self.clock)
        self.incarnations = dict.fromkeys(("x", "y", "z"), 0)
        self.held: dict[str, Lease] = {}
        self.leases: list[Lease] = []
        self.finished: set[tuple[str, str]] = set()
        self.epochs: dict[tuple[str, str], int] = {}
        for index in range(2):
            self.submit(index, index)

    def teardown(self) -> None:
        try:
            self.settle()
        finally:
            for where in self.films:
                self.mind.close(where)
            self.root.cleanup()

    @rule(index=st.integers(0, 1), priority=st.integers(0, 2))
    def submit(self, index: int, priority: int) -> None:
        mind = record(f"film {index}", priority=priority, max_tries=1000)
        self.mind.submit(self.films[index], mind, tasks_of(*self.shapes[index]))

    @rule(name=st.sampled_from("xyz"))
    def ask(self, name: str) -> None:
        gang = Gang(name=name, incarnation=str(self.incarnations[name]))
        answer = self.mind.next_order(gang)
        assert not isinstance(answer, Leave)
        if answer is None:
            self.held.pop(name, None)
            return
        lease = answer.lease
        if self.held.get(name) != lease:
            assert lease.epoch > self.epochs.get((lease.film, lease.task), 0), "an epoch was granted twice"
            assert (lease.film, lease.task) not in self.finished, "finished work was given out again"
        self.epochs[lease.film, lease.task] = lease.epoch
        self.held[name] = lease
        self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), blocks=st.integers(0, 4))
    def speak(self, data: st.DataObject, blocks: int) -> None:
        """Any lease ever granted says something; only the newest may be heard."""
        lease = data.draw(st.sampled_from(self.leases))
        task = next(task for task in self.mind.view(lease.film).tasks if task.name == lease.task)
        holds = task.leased and task.epoch == lease.epoch
        what = data.draw(st.sampled_from(["beat", "beat", "finish", "stopped", "error", "busy", "full"]))
        if what == "beat":
            verdict = self.mind.heartbeat(lease, Progress(blocks_done=blocks))
            assert (verdict is not Verdict.LOST) == holds
            assert (verdict is Verdict.STOP) == (holds and task.state is State.CHECKPOINT)
            return
        if what == "finish":
            said = self.mind.finish(lease, "video")
            if said:
                self.finished.add((lease.film, lease.task))
        elif what == "stopped":
            said = self.mind.stopped(lease)
        else:
            kind = FailureKind(what)
            said = self.mind.fail(lease, Failure(kind=kind, signature=str(blocks), message="x"))
        assert said == holds

    @rule(name=st.sampled_from("xyz"))
    def restart_workers(self, name: str) -> None:
        self.incarnations[name] += 1
        self.held.pop(name, None)

    @rule(name=st.sampled_from("xyz"))
    def lose_gang(self, name: str) -> None:
        self.mind.gang_lost(name)

    @rule(seconds=st.sampled_from([0.5, 3.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.mind.tick()

    @rule()
    def kill_the_director(self) -> None:
        before = {where: self.mind.view(where).tasks for where in self.films}
        for where in self.films:
            self.mind.close(where)
        self.mind = director(self.clock)
        for where in self.films:
            assert self.mind.view(where).tasks == before[where], "a restart forgot something"

    @rule(index=st.integers(0, 1), action=st.sampled_from(Action), shot=st.sampled_from([None, "s0", "s1"]))
    def wish(self, index: int, action: Action, shot: str | None) -> None:
        self.mind.control(self.films[index], action, shot)

    @invariant()
    def coherent(self) -> None:
        holders: list[str] = []
        for where in self.films:
            tasks = {task.name: task for task in self.mind.view(where).tasks}
            for task in tasks.values():
                ready = all(tasks[name].state is State.SUCCEEDED for name in task.after)
                assert task.state is not State.WAITING or ready
                assert task.state is not State.DEPEND or not ready
                assert not task.leased or ready
                assert (task.gang is not None) == task.leased
                assert task.state is not State.DEAD or task.reason
                assert (task.state is State.SUCCEEDED) == ((where, task.name) in self.finished)
                holders += [task.gang] if task.gang else []
        assert len(holders) == len(set(holders)), "a gang has two tasks"

    def settle(self) -> None:
        """Gangs that obey finish both films, whatever went before."""
        for where in self.films:
            self.mind.control(where, Action.RETRY)
            self.mind.control(where, Action.RESUME)
        self.mind.reconcile([])
        for where in self.films:
            self.mind.control(where, Action.RETRY)
        for _ in range(40):
            self.clock.now += 400
            self.mind.tick()
            answer = self.mind.next_order(Gang(name="last", incarnation="1"))
            if isinstance(answer, Order):
                assert self.mind.heartbeat(answer.lease, Progress(blocks_done=4)) is not Verdict.LOST
                assert self.mind.finish(answer.lease)
        assert all(self.mind.view(where).outcome is Outcome.DONE for where in self.films)


TestFarm = Farm.TestCase
TestFarm.settings = settings(max_examples=25, stateful_step_count=30)


@pytest.mark.slow
def test_farm_at_length() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Farm, settings=settings(max_examples=400, stateful_step_count=60))
