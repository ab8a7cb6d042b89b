"""Worker processes: every task is answered, also by a worker that fails or dies."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from longtake.engine.crew import Crew
from longtake.kernels.errors import WorkerError

MODULE = """
import os

def make(index):
    num_done = 0

    def work(task):
        nonlocal num_done
        if task == "fails":
            raise ValueError("no such thing")
        if task == "dies":
            os._exit(7)
        num_done += 1
        return index, num_done, task

    return work
"""

Make = Callable[[int], Callable[[str], tuple[int, int, str]]]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Of a module that other processes find, as they do not find tests."""
    (tmp_path / "crew_tasks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "crew_tasks", raising=False)
    made: Make = importlib.import_module("crew_tasks").make
    return made


@pytest.mark.parametrize("size", [0, 2])
def test_every_task_is_done_once(make: Make, size: int) -> None:
    tasks = [str(number) for number in range(8)]
    with Crew(make, size) as crew:
        found = dict(crew.run(tasks))
        assert set(found) == set(tasks)
        results = [result for result in found.values() if not isinstance(result, WorkerError)]
        assert sorted(task for _, _, task in results) == tasks
        assert {index for index, _, _ in results} == set(range(max(1, size)))
        assert max(count for _, count, _ in results) > 1, "workers stay"


def test_one_at_a_time_is_always_the_first_worker(make: Make) -> None:
    with Crew(make, 2) as crew:
        list(crew.run(["a", "b"]))
        alone = [result for _, result in crew.run(["c", "d", "e"], at_once=1)]
        assert [result[0] for result in alone if not isinstance(result, WorkerError)] == [0, 0, 0]
        assert [result[2] for result in alone if not isinstance(result, WorkerError)] == ["c", "d", "e"]


def test_a_worker_that_fails_or_dies_is_replaced(make: Make) -> None:
    with Crew(make, 1) as crew:
        found = list(crew.run(["a", "fails", "b", "dies", "c"]))
    assert [task for task, _ in found] == ["a", "fails", "b", "dies", "c"]
    assert [str(result) for task, result in found if task in ("fails", "dies")] == [
        "ValueError: no such thing",
        "the process ended",
    ]
    assert [result for task, result in found if task in "abc"] == [(0, 1, "a"), (0, 1, "b"), (0, 1, "c")]


def test_a_failure_in_this_process_leaves_the_rest(make: Make) -> None:
    with Crew(make, 0) as crew:
        found = [result for _, result in crew.run(["a", "fails", "b"])]
    assert isinstance(found[1], WorkerError) and str(found[1]) == "ValueError: no such thing"
    assert (found[0], found[2]) == ((0, 1, "a"), (0, 2, "b"))
