"""The table of a status, and when there is nothing more to follow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from longtake.jobs.status import FilmStatus, ShotStatus, State
from longtake.jobs.status_table import goes_on, status_table


def status(states: Sequence[str], **values: Any) -> FilmStatus:
    shots = {f"s{i}": ShotStatus(state=State(s), num_blocks=7, num_frames=80) for i, s in enumerate(states)}
    if values:
        shots["running"] = ShotStatus(state=State.RUNNING, num_blocks=7, num_frames=80, frames_done=40, **values)
    return FilmStatus(title="Harbour", film="f", state=State.RUNNING, video=None, updated_s=100.0, shots=shots)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (("DEAD", "RUNNING"), True),
        (("DEAD", "WAITING"), True),
        (("SUCCEEDED", "PAUSED"), True),
        (("SUCCEEDED", "DEAD", "DEPEND"), False),
        (("SUCCEEDED", "SUCCEEDED"), False),
    ],
)
def test_a_film_goes_on_while_a_shot_may(states: tuple[str, ...], expected: bool) -> None:
    assert goes_on(status(states)) is expected


@pytest.mark.parametrize(("state", "expected"), [("DEPEND", True), ("RUNNING", True), ("DEAD", False)])
def test_one_shot_goes_on_until_it_has_ended(state: str, expected: bool) -> None:
    assert goes_on(status([state]), "s0") is expected


def test_the_table() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(status_table(status(["SUCCEEDED"], frames_per_s=4.0, eta_s=10, gpu_hours=0.5), 160.0))
    assert isinstance(console.file, io.StringIO)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert lines[0] == "Harbour: RUNNING, 1m00s ago"
    assert lines[2:] == ["s0 SUCCEEDED 0/80", "running RUNNING 40/80 4 10s 0.50", "film RUNNING 40/160 4 30s 0.50"]
