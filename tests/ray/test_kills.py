"""SIGKILL of a worker, a gang, the director, a raylet, and everything, at random instants: the film stays the same."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from longtake.engine.video import probe
from tests.ray.films import MINI, digest, processes, render_undisturbed, wait_for
from tests.ray.kills import VICTIMS, Run, survive

pytestmark = pytest.mark.ray


def test_worker_gang_and_director_killed(film_of: Callable[..., Path], tmp_path: Path) -> None:
    film = film_of(scale=8)
    expected = render_undisturbed(film, tmp_path / "undisturbed")
    run = survive(film, tmp_path / "out", ["director", "gang"], seed=1, pause_s=1, patience_s=400)
    assert digest(run.out / "film.mp4") == expected
    assert sum(run.killed.values()) == 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.multigpu)])
def test_a_gang_of_two_goes_on_as_one_where_only_one_device_is_left(
    device: str, film_of: Callable[..., Path], tmp_path: Path
) -> None:
    tiny, mini = (("a", 300, None),), (("a", 150, None),)  # at 8 and at 16 frames a second
    film = film_of(shots=tiny) if device == "cpu" else film_of(shots=mini, model=MINI)
    out = tmp_path / "out"
    out.mkdir()
    run = Run(film, out, 1, counts="2", sizes="1,2", device=device)
    try:
        wait_for(lambda: run.blocks_done() >= 3)
        workers = processes(*VICTIMS["worker"], root=run.process.pid)
        assert run.kill("raylet"), "the host with both devices; another one has one"
        for worker in workers:  # they would live on for a while
            with contextlib.suppress(psutil.Error):
                worker.kill()
        assert run.process.wait(600) == 0, run.output.read_text()[-3000:]
    finally:
        run.end()
    log = (out / "a.log").read_text()
    assert re.findall(rf"on (\d) x {device}", log) == ["2", "1"]
    assert int(re.findall(r"block (\d+)/\d+ goes on", log)[-1]) >= 1, "what both ranks had on the disk by then"
    status = json.loads((out / "status.json").read_text())
    assert probe(out / "film.mp4").frames == status["shots"]["a"]["num_frames"] >= 2400
