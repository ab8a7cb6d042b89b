"""The director under a state machine of films, gangs, deaths and wishes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from longtake.jobs.orders import Action, Gang, Leave, Order, Outcome, Verdict
from longtake.jobs.states import Failure, FailureKind, Lease, Progress
from longtake.jobs.status import State
from tests.jobs.director_films import Clock, director, film, record, tasks_of


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
