"""Agreement, and the end: an error or a death on one rank is every rank's, and never a hang.

No test measures time: whatever would have to wait for one of the limits below hangs, and is told so by ``run_ranks``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longtake.engine import gang as gangs
from longtake.engine import gang_failure
from longtake.engine.gang import Gang, join
from longtake.engine.gang_failure import Failed, GangError, abort_groups, end_later, exit_code
from longtake.engine.gang_shot import serve
from longtake.engine.mesh import MeshShape
from longtake.engine.shot import ShotRenderer
from longtake.kernels.errors import ConfigError, StorageError
from tests.engine.gangs import RankError, run_ranks

# Longer than any test may take: what ends in time was ended by the news, not by a limit.
NEVER_S = 3600.0


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
    if where != "collective":  # what gloo holds is ended hard; everything else must come out by itself, however late
        gangs.GRACE_S = NEVER_S
    with join(NEVER_S) as gang:
        gang.any(False)
        if rank == 2:
            time.sleep(0.2)  # the others are probably there by then; it matters to none of them
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
    found = run_ranks(fail, 3, how, where)
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


def stick(rank: int) -> None:
    """Rank 1 fails while rank 0 is where nothing frees it."""
    if rank == 0:
        gangs.GRACE_S = 0.1
    with join(NEVER_S) as gang:
        gang.any(False)
        if rank == 1:
            raise StorageError("the disk is gone")
        threading.Event().wait()


def test_a_rank_that_nothing_frees_is_ended_hard() -> None:
    found = run_ranks(stick, 2)
    assert str(found[0]) == "died with 1"
    assert isinstance(found[1], StorageError)


def hang_at_the_end(rank: int, kind: type[Exception], failing: int, hanging: int, said: str, how: str) -> None:
    """One rank fails, and one cannot put its things away."""
    patch = pytest.MonkeyPatch()
    gangs.GRACE_S = gang_failure.LAST_S = NEVER_S
    if rank == hanging:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w")
        gangs.GRACE_S = 0.1
    try:
        with join(NEVER_S) as gang:
            gang.any(False)
            if rank == hanging and how == "abort":
                patch.setattr(gangs, "abort_groups", lambda patience_s: threading.Event().wait())
            if rank == failing:
                raise kind("no more")
            gang.minimum(1)
    except Exception:
        if rank == hanging:
            threading.Event().wait()
        raise


@pytest.mark.parametrize("how", ["abort", "caller"])
@pytest.mark.parametrize(
    ("kind", "failing", "hanging", "lines"),
    [
        (StorageError, 0, 0, ["longtake: no more (rank 0)"]),
        (StorageError, 1, 0, ["longtake: no more (rank 1)"]),
        (StorageError, 1, 1, []),
        (
            ZeroDivisionError,
            0,
            0,
            ["Traceback", "ZeroDivisionError: no more", "longtake: rank 0 failed at test_gang.py"],
        ),
        (ZeroDivisionError, 1, 0, ["longtake: rank 1 failed at test_gang.py"]),
        (ZeroDivisionError, 1, 1, ["Traceback", "ZeroDivisionError: no more"]),
    ],
)
def test_the_error_is_told_where_the_end_hangs(
    tmp_path: Path, kind: type[Exception], failing: int, hanging: int, lines: list[str], how: str
) -> None:
    said = tmp_path / "said"
    found = run_ranks(hang_at_the_end, 2, kind, failing, hanging, str(said), how)
    assert str(found[hanging]) == f"died with {exit_code(kind())}"
    assert "no more" in str(found[1 - hanging])
    words, _, stacks = said.read_text().partition("Thread 0x")
    told = [line for line in words.splitlines() if line.startswith(("longtake: ", "Traceback", "ZeroDivisionError"))]
    assert len(told) == len(lines), words
    assert all(line.startswith(start) for line, start in zip(told, lines, strict=True)), words
    assert "in hang_at_the_end" in stacks


def test_groups_are_aborted_once_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    aborted: list[str] = []
    free = threading.Event()

    def abort() -> None:
        aborted.append(threading.current_thread().name)
        free.wait()

    monkeypatch.setattr(dist, "is_initialized", lambda: not free.is_set())
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", abort)
    abort_groups(0.2)
    abort_groups(0.2)
    free.set()
    for thread in threading.enumerate():
        if thread.name == "gang-abort":
            thread.join()
    assert aborted == ["gang-abort"]


@pytest.mark.parametrize("alive", [True, False])
def test_who_has_told_the_error_does_not_tell_it_again(monkeypatch: pytest.MonkeyPatch, alive: bool) -> None:
    told: list[Failed] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(gang_failure, "end_now", lambda failure, rank, stacks: told.append(failure))
    failure = Failed(rank=0, error=StorageError("the disk is gone"))
    with monkeypatch.context() as patch:
        patch.setattr(threading, "main_thread", lambda: SimpleNamespace(is_alive=lambda: alive))
        end_later(failure, 0, 0.0)
        for thread in threading.enumerate():
            if thread.name == "gang-last":
                thread.join()
    assert told == [failure] * alive


def lose_leader(rank: int, dies: bool) -> tuple[str, bool]:
    """What another rank hears of rank 0's end, and whether it is to tell the user."""
    gangs.GRACE_S = NEVER_S
    with pytest.raises(GangError) as caught, join(NEVER_S) as gang:
        gang.any(False)
        if gang.leads:
            if dies:
                os._exit(9)
            raise ZeroDivisionError("by zero")
        gang.receive()
    return str(caught.value), gang.speaks


def test_the_leader_dies() -> None:
    found = run_ranks(lose_leader, 3, True)
    assert str(found[0]) == "died with 9"
    assert found[1:] == [("rank 0 died (rank 0)", True), ("rank 0 died (rank 0)", False)]


def test_the_leader_fails_and_says_so_itself() -> None:
    found = run_ranks(lose_leader, 3, False)
    assert isinstance(found[0], ZeroDivisionError)
    assert all("ZeroDivisionError: by zero" in said and not speaks for said, speaks in found[1:])


def leave(rank: int) -> int:
    gangs.GRACE_S = 0.1
    with join(NEVER_S) as gang:
        gang.any(False)
        if gang.leads:
            time.sleep(2)  # longer than a lost rank would leave it alive
    return rank


def test_a_rank_that_is_done_waits_for_the_leader() -> None:
    assert run_ranks(leave, 3) == [0, 1, 2]


def serve_inside(rank: int) -> int:
    """As a launcher's loop does that enters the gang for all ranks: the other ones end it in :func:`serve` already."""
    gangs.GRACE_S = NEVER_S
    with join(NEVER_S) as gang:
        if gang.leads:
            raise ZeroDivisionError("by zero")
        return serve(gang, ShotRenderer(gang), lambda: False)


def test_an_end_that_was_told_is_not_told_again() -> None:
    found = run_ranks(serve_inside, 2)
    assert isinstance(found[0], ZeroDivisionError) and found[1] == 1


def serve_a_bug(rank: int) -> str:
    """What a rank that follows says of an error that nobody expected."""
    gangs.GRACE_S = NEVER_S
    gang = join(NEVER_S)
    if not gang.leads:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            serve(gang, lambda *_, **__: 1 / 0, lambda: False)  # type: ignore[arg-type]
        return said.getvalue()
    with gang:
        gang.tell(SimpleNamespace(shot=None, folder=None, device="cpu"))
        gang.minimum(1)
    return ""


def test_a_rank_that_follows_shows_where_its_bug_is() -> None:
    leads, follows = run_ranks(serve_a_bug, 2)
    assert "rank 1 failed at test_gang.py" in str(leads)
    assert follows.startswith("Traceback") and follows.endswith("ZeroDivisionError: division by zero\n")


def stall(rank: int, how: str) -> None:
    gangs.GRACE_S = NEVER_S
    patience_s = 1.0 if how == "stopped" and rank == 0 else NEVER_S
    with join(NEVER_S, heartbeat_s=0.1, lost_after_s=patience_s) as gang:
        processes = gang.agree([os.getpid()], lambda said: [process for one in said for process in one])
        if rank == 1:
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            while True:  # until it hears that it is given up
                gang.check()
                time.sleep(0.05)
        if how == "busy":
            gang._timeout_s = 0.5
        try:
            gang.minimum(1)
        finally:
            if how == "stopped":
                os.kill(processes[1], signal.SIGKILL)


@pytest.mark.parametrize("how", ["stopped", "busy"])
def test_a_rank_that_lives_but_does_not_answer(how: str) -> None:
    """Stopped, it gives no sign of life; busy, it gives no answer."""
    found = run_ranks(stall, 2, how)
    said = "gave no sign of life" if how == "stopped" else "lives but has not answered"
    assert isinstance(found[0], GangError) and said in str(found[0])
    assert found[0].rank == 1


def test_exit_codes() -> None:
    assert exit_code(ConfigError("")) == 2
    assert exit_code(GangError("")) == 1
    assert exit_code(KeyboardInterrupt()) == 3
    assert Gang().speaks
