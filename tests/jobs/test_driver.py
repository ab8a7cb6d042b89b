"""What a film's job prints, as far as it needs no Ray that runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("ray")

from longtake.jobs.driver import Teller
from longtake.jobs.states import grant
from tests.jobs.director_films import Clock, director, film, record, tasks_of


def test_a_line_is_printed_when_it_says_something_new(tmp_path: Path) -> None:
    view = director(Clock()).submit(film(tmp_path), record(), tasks_of(None))
    shot, join = view.tasks
    clock, lines = Clock(), list[str]()
    teller = Teller(lines.append, clock)
    nothing = "film 0/16 frames, 0 of 1 shots done, 0.000 device hours"
    teller.tell(view)
    assert lines == ["s0: WAITING", "film.mp4: DEPEND", nothing]
    clock.now += 60
    teller.tell(view)
    assert len(lines) == 3, "nothing has changed"
    running = grant(shot, gang="g", incarnation="1", num_devices=1, now_s=0.0)
    view = dataclasses.replace(view, tasks=(dataclasses.replace(running, frames_done=4, frames_per_s=2.0), join))
    some = "film 4/16 frames, 0 of 1 shots done, 2 fps, ETA 6s, 0.000 device hours"
    teller.tell(view)
    assert lines[3:] == ["s0: RUNNING", some]
    clock.now += 1
    teller.tell(dataclasses.replace(view, tasks=(dataclasses.replace(running, frames_done=8), join)))
    assert len(lines) == 5, "it is told in a while"
    teller.tell(view, is_last=True)
    assert lines[5:] == [some]
