"""Gangs on two GPUs of one host, under NCCL: two gangs of one, one gang of two. Shrinking is in test_kills."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from longtake.engine.video import probe
from tests.ray.films import processes, wait_for
from tests.ray.following import Following

pytestmark = [pytest.mark.ray, pytest.mark.multigpu]


def test_two_gangs_of_one(following: Callable[..., Following], film_of: Callable[..., Path]) -> None:
    run = following(film_of("two", shots=(("a", 120, None), ("b", 120, None)), title="Two"), device="cuda")
    wait_for(lambda: run.shot("a").get("state") == run.shot("b").get("state") == "RUNNING")
    assert run.shot("a")["gang"] != run.shot("b")["gang"]
    run.join(600)
    assert run.code == 0, run.lines
    assert probe(run.out / "film.mp4").frames == 2 * 960


def test_one_gang_of_two_with_a_worker_killed(
    following: Callable[..., Following], film_of: Callable[..., Path]
) -> None:
    run = following(film_of("pair", shots=(("a", 120, None),), title="Pair"), sizes=(2,), device="cuda")
    run.wait_blocks("a", 3)
    assert run.shot("a")["gang"].startswith("gang-cuda-2-")
    processes("ray::RayTrainWorker", "ray::_RayTrainWorker")[-1].send_signal(signal.SIGKILL)
    run.join(600)
    assert run.code == 0, run.lines
    assert run.shot("a")["num_starts"] == 2
    assert probe(run.out / "film.mp4").frames == 960
