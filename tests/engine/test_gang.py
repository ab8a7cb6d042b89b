"""Agreement, and the end: an error or a death on one rank is every rank's within seconds, and never a hang."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longtake.engine.gang import Gang, join
from longtake.engine.gang_failure import GangError, exit_code
from longtake.engine.mesh import MeshShape
from longtake.kernels.errors import ConfigError, StorageError
from tests.engine.gangs import RankError, run_ranks

# An end must come long before the collectives' own timeout.
TIMEOUT_S = 40.0
SOON_S = 15.0


def test_a_gang_of_one_agrees_with_itself() -> None:
    gang = join()
    assert (gang.rank, gang.size, gang.leads) == (0, 1, True)
    assert gang.minimum(3) == 3
    assert gang.any(True) and not gang.any(False)
    assert gang.lead(lambda: "read") == "read"
    assert gang.device("cuda:1") == "cuda:1"
    gang.tell("nothing")
    gang.dismiss()


def agree(rank: int) -> dict[str, Any]:
    with join() as gang:
        found = {
            "least": gang.minimum(10 - rank),
            "any": [gang.any(rank == 2), gang.any(False)],
            "led": gang.lead(lambda: torch.arange(3)).tolist(),
            "all": gang.agree([rank], lambda said: [number for one in said for number in one]),
            "device": gang.device("cuda"),
            "mesh": gang.mesh_shape(8),
        }
        if gang.leads:
            for number in range(3):
                gang.tell(number)
            gang.dismiss(3)
        else:
            tasks = []
            while (task := gang.receive()) is not None:
                tasks.append(task)
            found["tasks"], found["code"] = tasks, gang.dismissed_with
        return found


def test_agreement() -> None:
    for rank, found in enumerate(run_ranks(agree, 4)):
        assert found["least"] == 7
        assert found["any"] == [True, False]
        assert found["led"] == [0, 1, 2]
        assert found["all"] == [0, 1, 2, 3]
        assert found["device"] == f"cuda:{rank}"
        assert found["mesh"] == MeshShape(sp=4)
        assert rank == 0 or (found["tasks"], found["code"]) == ([0, 1, 2], 3)


def mesh_of(rank: int, num_heads: int) -> MeshShape:
    with join() as gang:
        return gang.mesh_shape(num_heads)


def test_the_mesh_is_chosen_by_the_environment() -> None:
    assert run_ranks(mesh_of, 2, 12, LONGTAKE_MESH="tp=2") == [MeshShape(tp=2)] * 2
    for found in run_ranks(mesh_of, 2, 12, LONGTAKE_MESH="tp=2,sp=2"):
        assert isinstance(found, ConfigError | GangError)
    for found in run_ranks(mesh_of, 2, 3):
        assert "cannot share 3 heads" in str(found)


def fail(rank: int, how: str, where: str) -> None:
    """Rank 2 ends in some way while the others are in some place."""
    with join(TIMEOUT_S) as gang:
        gang.any(False)
        if rank == 2:
            time.sleep(0.2)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "ours":
                raise StorageError("the disk is gone", block=5, path="/film")
            if how == "foreign":
                raise ZeroDivisionError("by zero")
            raise KeyboardInterrupt
        if where == "agreement":
            gang.minimum(1)
        elif where == "collective":
            dist.all_reduce(torch.ones(4))
        elif where == "task":
            gang.receive()
        else:
            while True:
                gang.check()
                time.sleep(0.01)


@pytest.mark.parametrize(
    ("how", "where"),
    [
        ("killed", "collective"),
        ("killed", "agreement"),
        ("ours", "collective"),
        ("ours", "agreement"),
        ("ours", "work"),
        ("foreign", "task"),
        ("interrupted", "agreement"),
    ],
)
def test_one_rank_ends_and_all_do(how: str, where: str) -> None:
    started = time.monotonic()
    found = run_ranks(fail, 3, how, where)
    assert time.monotonic() - started < SOON_S
    kind, text = {
        "killed": (GangError, "rank 2 died"),
        "ours": (StorageError, "the disk is gone (block 5, rank 2, path /film)"),
        "foreign": (GangError, "ZeroDivisionError: by zero"),
        "interrupted": (KeyboardInterrupt, "rank 2 was stopped"),
    }[how]
    for error in found[:2]:
        if isinstance(error, RankError):  # stuck in a collective of gloo's, which nothing frees: ended hard
            assert (where, str(error)) == ("collective", f"died with {exit_code(kind())}")
        else:
            assert type(error) is kind, error.__notes__
            assert text in str(error)
    if how == "ours":
        assert found[2].rank == 2


def lose_leader(rank: int) -> None:
    with join(TIMEOUT_S) as gang:
        gang.any(False)
        if gang.leads:
            os._exit(9)
        gang.receive()


def test_the_leader_dies() -> None:
    started = time.monotonic()
    found = run_ranks(lose_leader, 3)
    assert time.monotonic() - started < SOON_S
    assert str(found[0]) == "died with 9"
    assert all(isinstance(error, GangError) and "rank 0 died" in str(error) for error in found[1:])


def stall(rank: int, how: str) -> None:
    with join(2.0, heartbeat_s=0.1) as gang:
        processes = gang.agree([os.getpid()], lambda said: [process for one in said for process in one])
        if rank == 1:
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(4)
        try:
            gang.minimum(1)
        finally:
            if rank == 0 and how == "stopped":
                os.kill(processes[1], signal.SIGKILL)


@pytest.mark.parametrize("how", ["stopped", "busy"])
def test_a_rank_that_lives_but_does_not_answer(how: str) -> None:
    """Stopped, it gives no sign of life; busy, it gives no answer."""
    started = time.monotonic()
    found = run_ranks(stall, 2, how)
    said = "gave no sign of life" if how == "stopped" else "lives but has not answered"
    assert isinstance(found[0], GangError) and said in str(found[0])
    assert found[0].rank == 1
    assert time.monotonic() - started < SOON_S


def test_exit_codes() -> None:
    assert exit_code(ConfigError("")) == 2
    assert exit_code(GangError("")) == 1
    assert exit_code(KeyboardInterrupt()) == 3
    assert Gang().speaks
