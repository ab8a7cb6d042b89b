"""The director's actor, as far as it needs no Ray that runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("ray")

from longtake.jobs import farm
from longtake.jobs.farm import DirectorActor
from longtake.jobs.filmorder import FarmOptions
from longtake.jobs.gang import GangSpec
from longtake.jobs.ledger import LEDGER_NAME, FilmRecord, Ledger
from longtake.jobs.orders import Action, Gang
from longtake.jobs.states import Task
from longtake.jobs.status import State
from longtake.jobs.wishes import WISHES_NAME, make_wish, take_wishes
from longtake.kernels.errors import StorageError

RECORD = FilmRecord(title="t", content_hash="t", toml='[[shot]]\nname="a"\nduration="1s"\nprompt="p"', source="f.toml")


def test_wishes_that_cannot_be_fulfilled_now_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor, where = DirectorActor(FarmOptions()), str(tmp_path)
    actor._mind.submit(where, RECORD, [Task(name="a")])
    make_wish(tmp_path, Action.PAUSE, None)

    def save(*arguments: object, **options: object) -> None:
        raise StorageError("the ledger cannot be written: disk I/O error")

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "save", save)
        actor._fulfil(where)
    assert len(list(take_wishes(where))) == 1
    actor._fulfil(where)
    assert not list(take_wishes(where))
    assert actor._mind.view(where).tasks[0].state is State.PAUSED
    (tmp_path / WISHES_NAME).rmdir()
    (tmp_path / WISHES_NAME).write_text("no folder")
    actor._fulfil(where)  # and the films after this one are looked after


def test_a_film_whose_storage_is_gone_keeps_no_gang_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor, homes = DirectorActor(FarmOptions()), [tmp_path / name for name in ("first", "second")]
    for home in homes:
        home.mkdir()
        actor._mind.submit(str(home), RECORD, [Task(name="a")])
    started: list[str] = []

    def launch(spec: GangSpec) -> None:
        if spec.storage.startswith(str(homes[0])):
            raise OSError(116, "Stale file handle")
        started.append(spec.storage)

    monkeypatch.setattr("longtake.jobs.farm.launch", launch)
    asyncio.run(actor._launch([], {"cpu": [2], "cuda": []}))
    assert started == [f"{homes[1]}/.ray"]
    assert len(actor._launched) == 1, "what never began did not die young"


def test_what_is_over_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A director lives as long as its cluster: a film that ended, whether released or not, and a gang that went."""
    monkeypatch.setattr(farm, "_cluster", lambda: ([], {"cpu": [], "cuda": []}))
    monkeypatch.setattr(farm, "SETTLED_S", -1.0)
    actor = DirectorActor(FarmOptions())
    for name in ("released", "left", "open"):
        (tmp_path / name).mkdir()
        actor._mind.submit(str(tmp_path / name), RECORD, [Task(name="a")])
        if name != "open":
            actor._mind.control(str(tmp_path / name), Action.CANCEL)

    async def gangs_come_and_go() -> None:
        await actor.release(str(tmp_path / "released"))
        for number in range(3):
            await actor.next_order(Gang(name=f"gang-cuda-1-{number}", incarnation="1", device="cuda"), 0.0)
        await actor._look()

    asyncio.run(gangs_come_and_go())
    assert [view.directory for view in actor._mind.views()] == [str(tmp_path / "open")]
    assert list(actor._publisher._states) == list(actor._publisher._films) == [str(tmp_path / "open")]
    assert not actor._mind._starts and not actor._idle_since and not actor._heard
    Ledger(tmp_path / "left" / LEDGER_NAME).close()  # and another director may have it
