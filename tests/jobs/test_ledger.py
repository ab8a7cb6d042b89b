"""The ledger keeps what it was given, for one writer, whatever happens to the writer."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longtake.jobs.ledger import FilmRecord, Ledger
from longtake.jobs.states import Task, TaskKind, Want
from longtake.jobs.status import State
from longtake.kernels.errors import ConfigError, StorageError

RECORD = FilmRecord(title="Harbour", content_hash="ab", toml="[film]", source="/films/harbour.toml", gang_sizes=(1, 2))


def tasks(num: int) -> list[Task]:
    return [Task(name=f"s{index}", position=index, after=(f"s{index - 1}",) if index else ()) for index in range(num)]


def test_everything_comes_back(tmp_path: Path) -> None:
    full = Task(
        name="arrival",
        kind=TaskKind.SHOT,
        position=1,
        after=("quay", "x"),
        state=State.CHECKPOINT,
        want=Want.PAUSE,
        epoch=7,
        gang="g",
        incarnation="i",
        gpu_s=1.25,
        device_bytes=2**40,
        reason='with "quotes"',
        started_s=5.5,
    )
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger.film is None
    ledger.take(RECORD, [full, *tasks(1)])
    ledger.close()
    again = Ledger(tmp_path / "ledger.sqlite")
    assert again.film == RECORD
    assert again.tasks == {"s0": tasks(1)[0], "arrival": full}
    assert list(again.tasks) == ["s0", "arrival"]
    kept = again.tasks["arrival"]
    assert isinstance(kept.state, State) and isinstance(kept.want, Want) and isinstance(kept.gpu_s, float)
    again.take(RECORD, tasks(1))
    again.close()
    assert list(Ledger(tmp_path / "ledger.sqlite").tasks) == ["s0"]


def test_only_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    with pytest.raises(StorageError, match="another director"):
        Ledger(path, wait_s=0.05)
    assert not path.with_name("ledger.sqlite-shm").exists()  # or network storage would not do
    ledger.close()
    Ledger(path).close()


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database, certainly not one" * 100)
    with pytest.raises(StorageError, match="cannot be read"):
        Ledger(path)
    with pytest.raises(StorageError, match="cannot be opened"):
        Ledger(tmp_path / "nowhere" / "ledger.sqlite")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("PRAGMA user_version=2", "is of version 2, this longtake reads 1; use the newer one, or move it away"),
        ("ALTER TABLE task DROP COLUMN gpu_s", "is of another version of longtake; move it away and submit"),
        ("ALTER TABLE film ADD COLUMN colour TEXT", "is of another version of longtake; move it away and submit"),
        ("UPDATE task SET state = 'REHEARSING'", "holds what no longtake wrote: .*REHEARSING.*; move it away"),
        ("UPDATE task SET after = 's1'", "holds what no longtake wrote"),
        (
            "UPDATE film SET gang_sizes = NULL, title = NULL, toml = NULL, priority = 'x'",
            "holds what no longtake wrote",
        ),
    ],
)
def test_a_ledger_of_another_version_is_one_clear_line(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.take(RECORD, tasks(2))
    ledger.close()
    db = sqlite3.connect(path)
    with db:
        db.execute(change)
    db.close()
    for _ in range(2):  # and it is let go of
        with pytest.raises((ConfigError, StorageError), match=message) as caught:
            Ledger(path, wait_s=0.05)
        assert len(str(caught.value).splitlines()) == 1


_WRITER = """
import dataclasses, sys
from pathlib import Path
from longtake.jobs.ledger import Ledger
from longtake.jobs.states import Task
ledger = Ledger(Path(sys.argv[1]))
task = ledger.tasks.get("a", Task(name="a"))
while True:
    task = dataclasses.replace(task, epoch=task.epoch + 1)
    ledger.save([task, dataclasses.replace(task, name="b", position=1)])
    sys.stdout.write(f"{task.epoch}\\n")
    sys.stdout.flush()
"""


def kill_writers(path: Path, num_rounds: int) -> int:
    """SIGKILL writers at random instants; returns the last epoch."""
    draw = random.Random(5)
    last = 0
    for _ in range(num_rounds):
        with subprocess.Popen([sys.executable, "-P", "-c", _WRITER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline()
            time.sleep(draw.random() * 0.05)
            os.kill(writer.pid, signal.SIGKILL)
            lines = (first + writer.stdout.read()).splitlines(keepends=True)
        said = [int(line) for line in lines if line.endswith(b"\n")]
        ledger = Ledger(path)
        epoch = ledger.tasks["a"].epoch
        ledger.close()
        assert ledger.tasks["b"].epoch == epoch, "half a transaction"
        assert epoch in (said[-1], said[-1] + 1), "what was acknowledged is there"
        assert said[0] == last + 1
        last = epoch
    return last


def test_killed_writers_lose_nothing(tmp_path: Path) -> None:
    assert kill_writers(tmp_path / "ledger.sqlite", 4) >= 4


@pytest.mark.slow
def test_many_killed_writers_lose_nothing(tmp_path: Path) -> None:
    assert kill_writers(tmp_path / "ledger.sqlite", 60) >= 60
