"""Submitting: the same film, the same job; nothing of it becomes shell; what the command line refuses."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longtake.jobs import cli
from longtake.jobs import submit as submission
from longtake.jobs.filmorder import ORDER_VARIABLE, FarmOptions, FilmOrder
from longtake.jobs.ledger import FilmRecord
from longtake.jobs.local_ray import local_ray
from longtake.jobs.orders import Action
from longtake.jobs.submit import submission_id, submit, wait
from longtake.jobs.wishes import make_wish, take_wishes
from longtake.kernels.errors import ConfigError, WorkerError

EVIL = 'Harbour"; rm -rf ~ #$(id)'


def order(**changes: Any) -> FilmOrder:
    record = {"title": "Harbour", "content_hash": "ab", "toml": "[film]", "source": "/f.toml", **changes}
    return FilmOrder(directory="/runs/harbour", record=FilmRecord(**record), options=FarmOptions(lease_s=9.0))


class Cluster:
    """As much of Ray's job client as is used."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.states: dict[str, str] = {}

    def list_jobs(self) -> list[Any]:
        return [SimpleNamespace(submission_id=job, status=SimpleNamespace(value=self.states[job])) for job in self.jobs]

    def submit_job(self, *, submission_id: str, **how: Any) -> None:
        assert submission_id not in self.jobs, "Ray refuses an id twice"
        self.jobs[submission_id], self.states[submission_id] = how, "RUNNING"

    def stop_job(self, job: str) -> None:
        self.states[job] = "STOPPED"

    def get_job_logs(self, job: str) -> str:
        return "one\ntwo\n"

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(driver_exit_code={"SUCCEEDED": 0, "FAILED": 1}.get(self.states[job]))


def test_the_same_film_is_the_same_job() -> None:
    assert submission_id(order()) == submission_id(order(priority=4))
    assert submission_id(order()) != submission_id(order(content_hash="cd"))
    assert submission_id(order(title="  Ä/? ")).startswith("longtake-film-")
    assert submission_id(order()).startswith("longtake-harbour-")


def test_submitting_twice_is_submitting_once() -> None:
    cluster = Cluster()
    first = submit(cluster, order())
    assert first.is_new
    assert not submit(cluster, order()).is_new
    cluster.states[first.job] = "FAILED"
    second = submit(cluster, order())
    assert (second.job, second.is_new) == (f"{first.job}-2", True)
    assert submit(cluster, order()) == submission.Submitted(job=second.job, is_new=False)
    cluster.states[second.job] = "SUCCEEDED"
    assert submit(cluster, order()).job == f"{first.job}-3"


def test_a_cluster_that_is_being_started_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "_POLL_S", 0.01)
    cluster, refusals = Cluster(), ["No available agent to submit job", "No available agent to submit job"]
    accept = cluster.submit_job

    def submit_job(**how: Any) -> None:
        if refusals:
            raise RuntimeError(f"Request failed with status code 500: {refusals.pop()}")
        accept(**how)

    cluster.submit_job = submit_job  # type: ignore[method-assign]
    assert submit(cluster, order()).job in cluster.jobs
    refusals.append("the disk is on fire")
    with pytest.raises(WorkerError, match=r"takes no job: .* on fire"):
        submit(cluster, order(content_hash="other"))


def test_no_word_of_a_film_reaches_a_shell() -> None:
    cluster = Cluster()
    job = submit(cluster, order(title=EVIL, toml=EVIL, source=EVIL)).job
    how = cluster.jobs[job]
    assert how["entrypoint"] == "python -P -m longtake.jobs.driver"
    assert not set(job) - set("abcdefghijklmnopqrstuvwxyz0123456789-")
    packed = how["runtime_env"]["env_vars"][ORDER_VARIABLE]
    assert packed.isascii() and not set(packed) & set("\"'`$;# ")
    assert FilmOrder.decode(packed) == order(title=EVIL, toml=EVIL, source=EVIL)


def test_a_film_too_long_for_a_job() -> None:
    import random

    noise = "".join(map(chr, random.Random(0).choices(range(33, 5000), k=200_000)))
    with pytest.raises(ConfigError, match="too long"):
        submit(Cluster(), order(toml=noise))


def test_waiting_says_the_log_and_ends_as_the_job_ends() -> None:
    for state, code in (("SUCCEEDED", 0), ("FAILED", 1), ("STOPPED", 3)):
        cluster, said = Cluster(), list[str]()
        job = submit(cluster, order()).job
        cluster.states[job] = state
        assert wait(cluster, job, say=said.append, stop=lambda: False) == code
        assert said == ["one", "two"]


def test_stopping_the_wait_stops_the_job() -> None:
    cluster = Cluster()
    job = submit(cluster, order()).job
    assert wait(cluster, job, say=lambda line: None, stop=lambda: True) == 3


def test_a_cluster_that_is_gone_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: object) -> None:
        raise ConnectionError("connection refused")

    for method in ("list_jobs", "get_job_logs", "get_job_info", "stop_job"):
        cluster = Cluster()
        job = submit(cluster, order()).job
        cluster.states[job] = "RUNNING" if method == "stop_job" else "SUCCEEDED"
        monkeypatch.setattr(cluster, method, gone)
        with pytest.raises(WorkerError, match="does not answer any more; submit the film again to go on: connection"):
            wait(cluster, job, say=lambda line: None, stop=lambda: True)
        if method == "list_jobs":
            with pytest.raises(WorkerError, match="does not answer"):
                submit(cluster, order())


def test_wishes_wait_in_order(tmp_path: Path) -> None:
    make_wish(tmp_path, Action.PAUSE, None)
    make_wish(tmp_path, Action.RETRY, "arrival")
    (tmp_path / ".wishes" / "0.json").write_text('{"action": "explode", "shot": null}')
    (tmp_path / ".wishes" / "1.json").write_text("torn")
    taken = list(take_wishes(tmp_path))
    assert [(wish.action, wish.shot) for wish in taken] == [(Action.PAUSE, None), (Action.RETRY, "arrival")]
    taken[0].done()
    assert [wish.action for wish in take_wishes(tmp_path)] == [Action.RETRY]
    assert list(take_wishes(tmp_path / "nowhere")) == []


@pytest.mark.parametrize("command", ["pause", "resume", "cancel", "retry", "logs"])
def test_asking_where_nothing_was_submitted(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, str(tmp_path)]) == 2
    assert "no film was submitted here" in capsys.readouterr().err


def test_bad_input_of_submit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = tmp_path / "film.toml"
    film.write_text('[[shot]]\nname = "a"\nduration = "1s"\nprompt = "p"\n[film]\nmodel = "no-such-model"\n')
    out = ["--out", str(tmp_path / "out")]
    assert cli.run(["submit", str(film), *out, "--device", "cpu"]) == 2
    assert "film.toml:6" in capsys.readouterr().err
    assert cli.run(["submit", str(film), *out, "--address", "http://127.0.0.1:1", "--gpus-per-shot", "0"]) == 2
    assert "--gpus-per-shot" in capsys.readouterr().err
    assert cli.run(["status", str(tmp_path)]) == 2


def test_help_needs_neither_ray_nor_torch() -> None:
    code = "import sys; from longtake.jobs import cli; cli.run(['--help']); print({'ray', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_address_that_is_named_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # which Ray prefers to what it is told
        monkeypatch.setenv(variable, "http://127.0.0.1:2")
    with pytest.raises(ConfigError, match=r"--address http://127.0.0.1:1: .*127.0.0.1:1"):
        submission.connect("http://127.0.0.1:1")


def test_ctrl_c_at_a_terminal_does_not_reach_a_ray_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dashboard went with it, and the film could not be asked to stop."""
    ray = pytest.importorskip("ray")
    said: list[str] = []
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"

    def init(**options: object) -> SimpleNamespace:
        said.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip())
        return SimpleNamespace(dashboard_url="127.0.0.1:1")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    before = signal.getsignal(signal.SIGINT)
    with local_ray() as dashboard:
        assert (dashboard, said, signal.getsignal(signal.SIGINT)) == ("http://127.0.0.1:1", ["True"], before)
