"""SIGKILL of a worker, a gang, the director, a raylet, and everything, at random instants: the film stays the same."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from longtake.engine.video import probe
from tests.ray.films import MINI, digest, kill_tree, processes, render_undisturbed, wait_for

pytestmark = pytest.mark.ray

VICTIMS = {
    "worker": ("ray::RayTrainWorker", "ray::_RayTrainWorker"),
    "gang": ("ray::GangActor",),
    "controller": ("ray::TrainController",),
    "director": ("ray::DirectorActor",),
    "raylet": ("raylet/raylet ",),
}


class Run:
    """A cluster in a tree of processes that renders one film, begun again after everything was killed."""

    def __init__(
        self, film: Path, out: Path, seed: int, counts: str = "1,1", sizes: str = "1", device: str = "cpu"
    ) -> None:
        self.film, self.out, self.draw = film, out, random.Random(seed)
        self.options = [counts, sizes, device]
        self.output = out.with_suffix(".txt")
        self.killed: Counter[str] = Counter()
        self.start()

    def start(self) -> None:
        module = ["-P", "-m", "tests.ray.cluster_process"]
        command = [sys.executable, *module, str(self.film), str(self.out), *self.options]
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), root]).strip(":")}
        with open(self.output, "a") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
                start_new_session=True,
                env={**environment, "OMP_NUM_THREADS": "1"},
            )

    def kill(self, what: str) -> bool:
        """SIGKILL one of a kind, or everything; whether there was one."""
        if what == "everything":
            self.end()
            self.start()
        else:
            victims = processes(*VICTIMS[what], root=self.process.pid)
            if what == "raylet":
                victims = [victim for victim in victims if "--head" not in " ".join(victim.cmdline())]
            if not victims:
                return False
            with contextlib.suppress(psutil.Error):
                self.draw.choice(victims).send_signal(signal.SIGKILL)
            if what == "raylet" and self.process.stdin is not None:
                self.process.stdin.write("node\n")
                self.process.stdin.flush()
        self.killed[what] += 1
        return True

    def end(self) -> None:
        """Kill the whole tree and see that it is gone."""
        kill_tree(self.process)

    def blocks_done(self) -> int:
        with contextlib.suppress(FileNotFoundError, ValueError):
            shots = json.loads((self.out / "status.json").read_text())["shots"].values()
            return sum(shot["blocks_done"] for shot in shots)
        return 0

    def rendered_twice(self) -> dict[str, int]:
        """By shot: blocks that a later start rendered although an earlier one had gone on behind them."""
        twice = {}
        for log in self.out.glob("*.log"):
            beginnings = re.findall(r"block (\d+)/\d+ (goes on|in)", log.read_text())
            reached, again = 0, 0
            for number, how in beginnings:
                if how == "in" and int(number) <= reached:
                    again += 1
                reached = max(reached, int(number)) if how == "in" else reached
            twice[log.stem] = again
        return twice


def survive(film: Path, out: Path, victims: list[str], *, seed: int, pause_s: float, patience_s: float) -> Run:
    """Kill in turn, each a random time after the one before (and a block at least), then wait for the end."""
    out.mkdir()
    run = Run(film, out, seed)
    try:
        for what in victims:
            blocks, until = run.blocks_done(), time.monotonic() + patience_s
            while run.blocks_done() == blocks and run.process.poll() is None:
                assert time.monotonic() < until, f"nothing went on before {what}; see {run.output}"
                time.sleep(0.05)
            time.sleep(run.draw.random() * pause_s)
            if run.process.poll() is not None:
                break
            while not run.kill(what) and run.process.poll() is None:
                time.sleep(0.1)
        code = run.process.wait(patience_s * 2)
        assert code == 0, run.output.read_text()[-3000:]
    finally:
        run.end()
    return run


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


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_twenty_kills_of_everything(film_of: Callable[..., Path], tmp_path: Path) -> None:
    film = film_of(scale=30)
    expected = render_undisturbed(film, tmp_path / "undisturbed")
    victims = ["worker", "director", "gang", "raylet", "everything"] * 4
    run = survive(film, tmp_path / "out", victims, seed=7, pause_s=3, patience_s=400)
    print(dict(run.killed), run.rendered_twice(), run.output.read_text()[-2000:])
    assert digest(run.out / "film.mp4") == expected
    assert sum(run.killed.values()) == 20
    assert sum(run.rendered_twice().values()) <= 10 * sum(run.killed.values())
