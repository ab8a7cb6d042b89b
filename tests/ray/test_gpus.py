"""Gangs on two GPUs of one host, under NCCL: two gangs of one, one gang of two. Shrinking is in test_kills."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from longtake.engine.video import probe
from longtake.jobs.stopping import EXIT_INTERRUPTED
from tests.ray.films import MINI, processes
from tests.ray.following import Following

pytestmark = [pytest.mark.ray, pytest.mark.multigpu]


def test_two_gangs_of_one(following: Callable[..., Following], film_of: Callable[..., Path]) -> None:
    film = film_of("two", model=MINI, shots=(("a", 3600, None), ("b", 3600, None)), title="Two")
    run = following(film, device="cuda")
    run.wait_blocks("a", 3)
    run.wait_blocks("b", 3)
    assert run.shot("a")["state"] == run.shot("b")["state"] == "RUNNING"
    assert run.shot("a")["gang"] != run.shot("b")["gang"]
    run.stop = True  # what a whole film takes, one gang shows below
    run.join(300)
    assert run.code == EXIT_INTERRUPTED, run.lines
    assert run.shot("a")["state"] == run.shot("b")["state"] == "PAUSED"


def test_one_gang_of_two_with_a_worker_killed(
    following: Callable[..., Following], film_of: Callable[..., Path]
) -> None:
    film = film_of("pair", model=MINI, shots=(("a", 150, None),), title="Pair")
    run = following(film, sizes=(2,), device="cuda")
    run.wait_blocks("a", 3)
    assert run.shot("a")["gang"].startswith("gang-cuda-2-")
    processes("ray::RayTrainWorker", "ray::_RayTrainWorker")[-1].send_signal(signal.SIGKILL)
    run.join(300)
    assert run.code == 0, run.lines
    assert run.shot("a")["num_starts"] == 2
    assert int(re.findall(r"block (\d+)/\d+ goes on", run.log("a"))[-1]) >= 1, "what both ranks had on the disk"
    assert probe(run.out / "film.mp4").frames == run.shot("a")["num_frames"] >= 16 * 150
