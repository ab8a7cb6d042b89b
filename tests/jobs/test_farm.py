"""The director's actor, as far as it needs no Ray that runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("ray")

from longtake.jobs.farm import DirectorActor
from longtake.jobs.filmorder import FarmOptions
from longtake.jobs.gang import GangSpec
from longtake.jobs.ledger import FilmRecord, Ledger
from longtake.jobs.orders import Action
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
