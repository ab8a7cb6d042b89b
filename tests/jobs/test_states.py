"""Transitions of one task: what fails how often, what stopping leads to."""

from __future__ import annotations

import dataclasses

import pytest

from longtake.jobs.states import (
    Failure,
    FailureKind,
    Progress,
    RetryPolicy,
    Task,
    TransitionError,
    Want,
    ask,
    cancelled,
    failed,
    finished,
    grant,
    paused,
    progressed,
    resumed,
    retried,
    stopped,
)
from longtake.jobs.status import State

POLICY = RetryPolicy(max_tries=5, max_same=3, backoff_s=2.0, max_backoff_s=20.0)
CRASH = Failure(kind=FailureKind.CRASH, signature="worker", message="its worker died")


def error(text: str) -> Failure:
    return Failure(kind=FailureKind.ERROR, signature=text, message=text)


def granted(task: Task) -> Task:
    return grant(task, gang="g", incarnation="i", num_devices=1, now_s=0.0)


def fail_with(task: Task, failure: Failure, blocks_done: int = 0) -> Task:
    running = progressed(granted(task), Progress(blocks_done=blocks_done), 1.0)
    return failed(running, failure, POLICY, now_s=100.0)


def test_failing_the_same_way_is_stopped_even_with_blocks_in_between() -> None:
    task = Task(name="a", num_blocks=100)
    for block in (5, 10):
        task = fail_with(task, error("no memory"), block)
        assert task.state is State.WAITING
    task = fail_with(task, error("no memory"), 15)
    assert task.state is State.DEAD
    assert task.reason == "failed the same way 3 times: no memory"


def test_different_errors_and_crashes_count_until_a_block_is_made() -> None:
    task = Task(name="a", num_blocks=100)
    for failure in (error("x"), error("y"), CRASH, CRASH):
        task = fail_with(task, failure)
        assert task.state is State.WAITING
    assert fail_with(task, CRASH).state is State.DEAD
    assert fail_with(task, CRASH, 1).num_failures == 1


def test_crashes_with_progress_never_end_a_shot() -> None:
    task = Task(name="a", num_blocks=1000)
    for block in range(1, 100):
        task = fail_with(task, CRASH, block)
    assert task.state is State.WAITING


def test_backoff_doubles_up_to_a_limit() -> None:
    assert [POLICY.delay_s(count) for count in (1, 2, 3, 4, 5, 10**6)] == [2, 4, 8, 16, 20, 20]
    task = fail_with(fail_with(Task(name="a"), CRASH), CRASH)
    assert task.not_before_s == 104.0


def test_a_busy_folder_is_no_failure() -> None:
    task = Task(name="a")
    for _ in range(50):
        task = fail_with(task, Failure(kind=FailureKind.BUSY, signature="lock", message="in use"))
    assert task.state is State.WAITING
    assert task.num_failures == 0


@pytest.mark.parametrize(
    ("want", "state"), [(Want.REQUEUE, State.WAITING), (Want.PAUSE, State.PAUSED), (Want.CANCEL, State.DEAD)]
)
def test_what_a_stop_leads_to(want: Want, state: State) -> None:
    asked = ask(granted(Task(name="a")), want)
    assert asked.state is State.CHECKPOINT
    assert stopped(asked).state is state
    assert stopped(asked).gang is None
    assert finished(asked, video="a.mp4", now_s=1.0).state is State.SUCCEEDED


def test_wishes_while_it_stops() -> None:
    running = granted(Task(name="a"))
    assert stopped(resumed(paused(running))).state is State.WAITING
    assert stopped(paused(cancelled(running))).state is State.DEAD
    assert stopped(ask(paused(running), Want.REQUEUE)).state is State.PAUSED
    assert failed(cancelled(running), CRASH, POLICY, 0.0).reason == "cancelled"
    assert failed(paused(running), CRASH, POLICY, 0.0).state is State.PAUSED


def test_retry_brings_back_a_dead_one() -> None:
    dead = dataclasses.replace(Task(name="a"), state=State.DEAD, num_failures=9, num_same=3, reason="x", epoch=4)
    again = retried(dead)
    assert (again.state, again.num_failures, again.num_same, again.epoch) == (State.WAITING, 0, 0, 4)
    done = finished(granted(Task(name="a")), video=None, now_s=0.0)
    assert retried(done) == done == cancelled(done) == paused(done)


def test_wrong_transitions_are_refused() -> None:
    with pytest.raises(TransitionError):
        stopped(Task(name="a"))
    with pytest.raises(TransitionError):
        granted(granted(Task(name="a")))
