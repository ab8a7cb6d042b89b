"""A film on a local Ray when things go wrong: errors, full disks, sleepers, a cluster that is gone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from longtake.jobs import cli
from longtake.jobs.submit import connect, submit
from tests.ray.films import digest, processes, render_undisturbed, wait_for
from tests.ray.following import Following, film_order

pytestmark = pytest.mark.ray

WORKERS = ("ray::RayTrainWorker", "ray::_RayTrainWorker")


@pytest.fixture
def budgets_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that holds nothing is found out by the shot, as what nobody thought of is."""
    monkeypatch.setattr("longtake.jobs.driver.check_budgets", lambda *_: None)


@pytest.mark.usefixtures("budgets_unchecked")
def test_a_shot_that_fails_the_same_way_stops_costing(
    following: Callable[..., Following], film_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    film = film_of("bad", shots=(("a", 4, None), ("b", 4, None), ("c", 4, "b")), title="Bad")
    film.write_text(film.read_text().replace('prompt = "shot b"', 'prompt = "shot b"\ncache.device = "1KiB"'))
    run = following(film)
    run.join(600)
    assert run.code == 1
    assert [run.shot(name)["state"] for name in "abc"] == ["SUCCEEDED", "DEAD", "DEPEND"]
    assert run.shot("b")["num_starts"] == 3
    assert run.shot("b")["reason"].startswith("failed the same way 3 times: CapacityError: a device budget of 1,024")
    assert cli.run(["status", str(run.out)]) == 0
    assert "failed the same way 3 times" in capsys.readouterr().out
    assert cli.run(["logs", str(run.out), "--shot", "b"]) == 0
    assert capsys.readouterr().out.count("failed: CapacityError") == 3


@pytest.mark.usefixtures("budgets_unchecked")
def test_a_shot_that_gets_nowhere_is_dead_after_so_many_tries(
    following: Callable[..., Following], film_of: Callable[..., Path]
) -> None:
    film = film_of("nowhere", shots=(("a", 4, None),), title="Nowhere", film=('cache.device = "1KiB"',))
    run = following(film, max_tries=2)
    run.join(600)
    assert run.code == 1
    assert (run.shot("a")["state"], run.shot("a")["num_starts"]) == ("DEAD", 2)
    assert run.shot("a")["reason"].startswith("2 tries without a new block: CapacityError")


def test_a_gang_back_from_the_dead_writes_nothing(
    following: Callable[..., Following], film_of: Callable[..., Path], tmp_path: Path
) -> None:
    film = film_of("sleep", shots=(("a", 60, None),), title="Sleep")
    run = following(film)
    run.wait_blocks("a", 4)
    sleepers = processes(*WORKERS)  # and those of gangs that have nothing to do
    for sleeper in sleepers:
        sleeper.send_signal(signal.SIGSTOP)
    try:
        run.wait_state("a", "WAITING")  # nobody heard of it for a lease
    finally:
        for sleeper in sleepers:
            sleeper.send_signal(signal.SIGCONT)
    run.join(600)
    assert run.code == 0, run.lines
    assert "lost the lease" in run.log("a")
    assert len(re.findall(r"epoch \d+", run.log("a"))) >= 2
    assert digest(run.out / "film.mp4") == render_undisturbed(film, tmp_path / "undisturbed")


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system takes root")
def test_a_full_disk_pauses_and_resume_goes_on(
    following: Callable[..., Following], film_of: Callable[..., Path], tmp_path: Path
) -> None:
    film = film_of("full", shots=(("a", 40, None),), title="Full")
    small = tmp_path / "out-full" / "a"
    small.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], check=True)
    try:
        run = following(film)
        run.wait_state("a", "PAUSED")
        shot = run.shot("a")
        assert "disk is full" in shot["reason"] and shot["num_starts"] == 1
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        assert cli.run(["resume", str(run.out)]) == 0
        run.join(600)
        assert run.code == 0, run.lines
        assert digest(run.out / "film.mp4") == render_undisturbed(film, tmp_path / "undisturbed")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_submitting_twice_is_one_job_with_its_log_in_the_dashboard(
    local_cluster: str, film_of: Callable[..., Path], tmp_path: Path
) -> None:
    order = film_order(film_of("job", shots=(("a", 20, None),), title="Job"), tmp_path / "out-job")
    client = connect(local_cluster)
    first = submit(client, order, python=sys.executable)
    assert first.is_new and first.job.startswith("longtake-job-")
    again = submit(client, order, python=sys.executable)
    assert (again.job, again.is_new) == (first.job, False)
    wait_for(lambda: client.get_job_status(first.job) in ("SUCCEEDED", "FAILED"))
    log = client.get_job_logs(first.job)
    assert client.get_job_status(first.job) == "SUCCEEDED", log
    assert "Job 160/160 frames, 1 of 1 shots done" in log
    third = submit(client, order, python=sys.executable)
    assert (third.job, third.is_new) == (f"{first.job}-2", True)
    wait_for(lambda: client.get_job_status(third.job) in ("SUCCEEDED", "FAILED"))
    assert client.get_job_status(third.job) == "SUCCEEDED", client.get_job_logs(third.job)
