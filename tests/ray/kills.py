"""Kills on Ray: one process of a kind, or everything, at random instants, until a film is finished all the same.

    python -m tests.ray.kills --rounds 20 --json FILE

renders films of six shots on two hosts, kills in each one of every kind, in an order drawn by lot, and compares it with
the undisturbed film; until there were so many kills of each kind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from tests.ray.films import digest, kill_tree, processes, render_undisturbed, write_film

VICTIMS = {
    "worker": ("ray::RayTrainWorker", "ray::_RayTrainWorker"),
    "gang": ("ray::GangActor",),
    "controller": ("ray::TrainController",),
    "director": ("ray::DirectorActor",),
    "raylet": ("raylet/raylet ",),
}
KINDS = ("worker", "gang", "director", "raylet", "everything")
SCALE = 12


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


def one_film(folder: Path, model: Path, number: int) -> dict[str, Any]:
    """A film in which each kind is killed once."""
    victims = random.Random(number).sample(KINDS, len(KINDS))
    film = write_film(folder / f"{number}.toml", model, scale=SCALE, seed=number)
    expected = render_undisturbed(film, folder / f"{number}-undisturbed")
    started = time.monotonic()
    run = survive(film, folder / f"{number}", victims, seed=number, pause_s=2, patience_s=400)
    return {
        "killed": [kind for kind in victims if run.killed[kind]],
        "equal": digest(run.out / "film.mp4") == expected,
        "blocks": run.blocks_done(),
        "blocks_rendered_twice": sum(run.rendered_twice().values()),
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    """Write a record of a long series, film by film."""
    from longtake.engine import record
    from longtake.engine.random_model import write_random_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20, help="kills of each kind")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as Ray sets it for a worker with one CPU: the same sums
    killed, films = Counter[str](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        model = write_random_model(Path(name) / "model")
        while min(killed[kind] for kind in KINDS) < options.rounds:
            films.append(one_film(Path(name), model, len(films) + 1))
            killed.update(films[-1]["killed"])
            results = {"kills": dict(killed), "all_equal": all(film["equal"] for film in films), "films": films}
            record.write(options.json, "survival on ray", {"rounds": options.rounds, "scale": SCALE}, results)
            print(films[-1], flush=True)


if __name__ == "__main__":
    main()
