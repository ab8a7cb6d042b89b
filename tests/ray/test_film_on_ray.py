"""A film on a local Ray with two gangs: submitted, disturbed, asked things of, and measured."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longtake.engine.video import probe
from longtake.jobs import cli
from tests.ray.films import digest, processes, render_undisturbed, wait_for
from tests.ray.following import Following

pytestmark = pytest.mark.ray


def test_six_shots_on_two_gangs_with_a_worker_killed(
    following: Callable[..., Following], film_of: Callable[..., Path], tmp_path: Path
) -> None:
    film = film_of(scale=4)
    run = following(film)
    run.wait_blocks("a", 2)
    run.wait_blocks("c", 2)
    victim = processes("ray::RayTrainWorker", "ray::_RayTrainWorker")[0]
    victim.send_signal(signal.SIGKILL)
    run.join(600)
    assert run.code == 0, run.lines
    assert digest(run.out / "film.mp4") == render_undisturbed(film, tmp_path / "undisturbed")
    starts = sum(run.shot(name)["num_starts"] for name in "abcdef")
    assert starts == 7, "one shot went on, the others were given out once"
    assert json.loads((run.out / "status.json").read_text())["state"] == "SUCCEEDED"


def test_wishes_and_preemption(
    following: Callable[..., Following],
    film_of: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = (("a", 150, None), ("b", 150, None), ("c", 4, "a"))
    film = film_of("low", shots=long, title="Low")
    low = following(film)
    low.wait_blocks("a", 3)
    low.wait_blocks("b", 3)
    high = following(film_of("high", shots=(("x", 4, None), ("y", 4, None)), title="High"), priority=9)
    wait_for(lambda: "SUCCEEDED" in {high.shot(name).get("state") for name in "xy"})
    assert low.shot("c")["state"] == "DEPEND"
    high.join(600)
    assert high.code == 0

    wait_for(lambda: low.shot("a")["state"] == low.shot("b")["state"] == "RUNNING")
    assert cli.run(["cancel", str(low.out), "--shot", "a"]) == 0  # in the middle of a block, or of its commit
    assert cli.run(["pause", str(low.out), "--shot", "b"]) == 0
    wait_for(lambda: low.shot("a")["state"] == "DEAD" and low.shot("b")["state"] == "PAUSED")
    assert low.shot("a")["reason"] == "cancelled"
    assert low.shot("a")["blocks_done"] < low.shot("a")["num_blocks"]
    assert cli.run(["pause", str(low.out), "--shot", "zz"]) == 2
    assert cli.run(["retry", str(low.out), "--shot", "a"]) == 0
    assert cli.run(["resume", str(low.out)]) == 0
    assert cli.run(["status", str(low.out)]) == 0
    assert "Low: " in capsys.readouterr().out
    low.join(600)
    assert low.code == 0, low.lines
    assert digest(low.out / "film.mp4") == render_undisturbed(film, tmp_path / "undisturbed")
    assert cli.run(["logs", str(low.out)]) == 0
    log = capsys.readouterr().out
    assert "a: CHECKPOINT -> DEAD" in log
    assert "b: CHECKPOINT -> PAUSED" in log
    assert "CHECKPOINT -> WAITING" in log, "nothing was preempted"


def test_a_gang_of_two_shards_its_shots(following: Callable[..., Following], film_of: Callable[..., Path]) -> None:
    run = following(film_of("pair", shots=(("a", 20, None), ("b", 4, "a")), title="Pair"), sizes=(2,))
    run.wait_blocks("a", 2)
    assert run.shot("a")["gang"].startswith("gang-cpu-2-")
    processes("ray::RayTrainWorker", "ray::_RayTrainWorker")[-1].send_signal(signal.SIGKILL)
    run.join(600)
    assert run.code == 0, run.lines
    assert probe(run.out / "film.mp4").frames == sum(run.shot(name)["num_frames"] for name in "ab")
    assert run.shot("a")["num_starts"] == 2


def test_what_is_exported(
    following: Callable[..., Following], film_of: Callable[..., Path], local_cluster: str
) -> None:
    import ray
    from ray.job_submission import JobSubmissionClient

    from longtake.jobs.board import board_metrics

    run = following(film_of("measured", shots=(("a", 40, None), ("b", 4, "a")), title="Measured"))
    run.wait_blocks("a", 4)
    assert cli.run(["pause", str(run.out)]) == 0
    wait_for(lambda: run.shot("a")["state"] == "PAUSED")
    shot = run.shot("a")
    assert min(shot[f"{tier}_cache_bytes"] for tier in ("device", "host", "disk")) > 0
    assert shot["stalled_s"] is not None
    assert cli.run(["resume", str(run.out)]) == 0  # what it attends is read from the disk now
    run.join(600)
    assert run.code == 0
    dashboard: Any = JobSubmissionClient(local_cluster)
    runs = dashboard._do_request("GET", "/api/train/v2/runs/v1").json()["train_runs"]
    gangs = [gang for gang in runs if gang["name"].startswith("gang-cpu-1-")]
    assert gangs and all(len(gang["attempts"][-1]["workers"]) == 1 for gang in gangs)
    list_nodes: Any = ray.nodes
    port = list_nodes()[0]["MetricsExportPort"]

    def scraped() -> set[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return {line.split("{")[0] for line in lines if 'film="Measured"' in line}

    missing: set[str] = set()

    def all_there() -> bool:
        missing.clear()
        missing.update(board_metrics() - scraped())
        return not missing

    wait_for(lambda: all_there() or None, timeout_s=300, interval_s=1.0)  # processes report every ten seconds
    assert not missing


def test_all_ports_are_on_loopback(local_cluster: str) -> None:
    for process in processes():
        for connection in process.net_connections(kind="tcp"):
            if connection.status == "LISTEN":
                ip = connection.laddr.ip.removeprefix("::ffff:")
                if ip == "::" and any("RayTrainWorker" in word for word in process.cmdline()):
                    continue  # the store at which torch's process group meets; it cannot be told where to listen
                assert ip in ("127.0.0.1", "::1"), (process.cmdline(), connection)
