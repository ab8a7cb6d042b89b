"""A render that is killed, whenever, and run again until it is finished makes what an undisturbed one makes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from longtake.engine.random_model import write_random_model
from tests.survival.kills import COUNTS, Survival
from tests.survival.nursery import DROP_STEPS, STEPS, Nursery


@pytest.fixture(scope="module")
def survival(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survival]:
    folder = tmp_path_factory.mktemp("survival")
    with Nursery(folder / "log") as nursery:
        yield Survival(nursery, folder, write_random_model(folder / "model"))


@pytest.fixture(scope="module")
def forgetful(survival: Survival) -> Survival:
    """The same film on a disk that keeps only what is needed."""
    folder = survival.folder / "needed"
    folder.mkdir()
    return Survival(survival.nursery, folder, survival.folder / "model", keep="needed")


def test_killed_while_history_is_deleted(survival: Survival, forgetful: Survival) -> None:
    kept = [name for name in forgetful.expected if "/kv.zarr/" in name and "/c." in name]
    assert not kept, "a finished film needs no history"
    for name, content in survival.expected.items():
        assert content == forgetful.expected.get(name, content) or name.endswith("config.json"), name
    kills = [(step, count) for step in DROP_STEPS for count in (1, 2)]  # a slow disk makes few of many deletions
    assert forgetful.kill_at(*kills, ("journaled", 2)) == len(kills) + 1


def test_killed_at_random_instants(survival: Survival) -> None:
    tally = survival.random_kills(8, seed=20)
    assert tally.equal == tally.films > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_two_hundred_random_instants(survival: Survival) -> None:
    tally = survival.random_kills(200, seed=1)
    assert tally.equal == tally.films > 0


@pytest.mark.parametrize("num_signals", [1, 2, 3])
def test_stopped_by_signals(survival: Survival, num_signals: int) -> None:
    assert survival.stop(num_signals, seed=num_signals) >= 1


def test_killed_at_each_step(survival: Survival) -> None:
    assert survival.kill_at(*((step, 1) for step in STEPS)) == len(STEPS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_a_step_again_and_again(survival: Survival, step: str) -> None:
    assert survival.kill_at(*((step, count) for count in COUNTS)) >= 1
