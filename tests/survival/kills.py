"""Kills renders and compares what comes out: at random instants, at steps of a commit. Run as a script for a record.

python -m tests.survival.kills --kills 200 --json FILE
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longtake.engine.latents import LatentLog
from longtake.jobs.verify import verify
from longtake.offload.run import committed_blocks
from tests.survival.nursery import DROP_STEPS, STEPS, Nursery

FILM = """\
[film]
model = "{model}"
seed = 3
[film.cache]
device = "64KiB"
host = "64KiB"
[[shot]]
name = "arrival"
duration = "24s"
prompt = "pan right"
[[shot.beat]]
at = "9s"
prompt = "a boat"
[[shot]]
name = "quay"
duration = "15s"
after = "arrival"
prompt = "pan left"
"""
NUM_PREFIX = {"arrival": 0, "quay": 2}
NUM_HEADS = 2
KILLED = -9
COUNTS = (1, 2, 3, 7, 15)


@dataclass
class Tally:
    """What happened to the films of a series.

    ``instants_s`` are those of the kills, after the start of the process that was killed; ``blocks`` how many blocks of
    the two shots were durable then.
    """

    films: int = 0
    equal: int = 0
    instants_s: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    missed: int = 0
    most_kills_of_a_film: int = 0


class Survival:
    """One film, rendered once undisturbed, then again and again by processes that are killed.

    Args:
        nursery: forks the processes.
        folder: for the films.
        model: of the film.
        keep: what of the history stays on the disk.
    """

    def __init__(self, nursery: Nursery, folder: Path, model: Path, keep: str = "all") -> None:
        self.nursery, self.folder = nursery, folder
        self.film = folder / "film.toml"
        text = FILM.format(model=model)
        self.film.write_text(text if keep == "all" else text.replace("[film.cache]", f'[film.cache]\nkeep = "{keep}"'))
        if keep == "all":  # first calls of libraries take their time
            nursery.render(self.film, folder / "warm-up")
        code, self.seconds = nursery.render(self.film, folder / "undisturbed")
        assert code == 0, nursery.log()
        self.expected = contents(folder / "undisturbed")
        assert keep != "all" or contents(folder / "warm-up") == self.expected
        assert not verify(folder / "undisturbed").damages
        self._num_films = 0

    def new(self) -> Path:
        """The directory of another film."""
        self._num_films += 1
        return self.folder / f"film{self._num_films}"

    def check(self, out: Path) -> None:
        """The directory holds what the undisturbed run made, nothing else, and all of it is whole."""
        found = contents(out)
        different = [name for name in {*found, *self.expected} if found.get(name) != self.expected.get(name)]
        assert not different, f"{out}: {sorted(different)}\n{self.nursery.log()}"
        assert not verify(out).damages
        assert not [path for path in out.rglob("*.partial") if ".prompts" not in path.parts]
        for shot in ("arrival", "quay"):
            lines = [json.loads(line)["block"] for line in (out / shot / "metrics.jsonl").read_text().splitlines()]
            assert lines == sorted(set(lines)), lines
        assert json.loads((out / "status.json").read_text())["state"] == "SUCCEEDED"

    def check_on_the_way(self, out: Path) -> int:
        """After a kill nothing that counts is damaged; returns how many blocks are committed: with their latents."""
        folders = [out / shot for shot in ("arrival", "quay") if (out / shot / "journal").exists()]
        if not folders:
            return 0
        damages = verify(out).damages
        assert not damages, [damage.describe() for damage in damages]
        return sum(map(committed, folders))

    def random_kills(self, num_kills: int, seed: int) -> Tally:
        """Films whose processes are killed at random instants until they are finished, until there are enough kills."""
        chooser, tally = random.Random(seed), Tally()
        while len(tally.instants_s) < num_kills:
            out, kills, blocks, longest_s = self.new(), 0, 0, self.seconds
            while True:
                instant = chooser.uniform(0, longest_s)
                code, _ = self.nursery.render(self.film, out, signals=[(instant, signal.SIGKILL)])
                if code == 0:
                    tally.missed += 1
                    break
                assert code == KILLED, self.nursery.log()
                kills += 1
                there = self.check_on_the_way(out)
                assert there >= blocks, "committed blocks are gone"
                longest_s = self.seconds if there > blocks else 1.3 * longest_s  # a busy machine still gets on
                blocks = there
                tally.instants_s.append(round(instant, 4))
                tally.blocks.append(there)
            self.check(out)
            tally.films += 1
            tally.equal += 1
            tally.most_kills_of_a_film = max(tally.most_kills_of_a_film, kills)
        return tally

    def stop(self, num_signals: int, seed: int) -> int:
        """A film whose processes are sent SIGTERM at random instants, once or more, until it is finished; how often.

        The exit code of each that was stopped is 3. A signal before the process answers them, or after, just ends it. A
        film that is finished before the first signal does not count: another one is begun.
        """
        chooser, stops, seconds = random.Random(seed), 0, self.seconds
        while not stops:
            out, blocks, longest_s = self.new(), 0, 0.6 * seconds
            while True:
                instant = chooser.uniform(0, longest_s)
                signals = [(instant + 0.02 * number, signal.SIGTERM) for number in range(num_signals)]
                code, seconds = self.nursery.render(self.film, out, signals=signals)
                if code == 0:
                    break
                assert code in (3, -signal.SIGTERM), self.nursery.log()
                stops += 1
                there = self.check_on_the_way(out)
                assert there >= blocks, "committed blocks are gone"
                longest_s = 0.6 * self.seconds if there > blocks else 1.3 * longest_s  # as above
                blocks = there
            self.check(out)
        return stops

    def kill_at(self, *kills: tuple[str, int]) -> int:
        """One film whose process is killed when a step is over for the n-th time, again for each pair; how often."""
        out, code, num_kills = self.new(), KILLED, 0
        for kill in kills:
            code, _ = self.nursery.render(self.film, out, kill_at=kill)
            assert code in (0, KILLED), self.nursery.log()
            if code == KILLED:
                num_kills += 1
                self.check_on_the_way(out)
        if code != 0:
            code, _ = self.nursery.render(self.film, out)
            assert code == 0, self.nursery.log()
        self.check(out)
        return num_kills


def committed(folder: Path) -> int:
    """How many blocks of a shot are there to go on from: with their history and their latents."""
    if not (folder / "latents.zarr" / "zarr.json").exists():
        return 0
    latents = LatentLog.existing(folder / "latents.zarr").num_written()
    return min(committed_blocks(folder, NUM_HEADS), latents + NUM_PREFIX[folder.name])


def contents(out: Path) -> dict[str, str]:
    """Hashes of the film, its videos, the store and the latents, by name."""
    names = ["film.mp4", "*/*.mp4", "*/segments/*", "*/kv.zarr/**/*", "*/latents.zarr/**/*", "*/config.json"]
    paths = {path for name in names for path in out.glob(name) if path.is_file()}
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def main() -> None:
    """Write a record of a long series."""
    from longtake.engine import record
    from longtake.engine.random_model import write_random_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Nursery(Path(name) / "log") as nursery:
        folder = Path(name)
        survival = Survival(nursery, folder, write_random_model(folder / "model"))
        tally = survival.random_kills(options.kills, options.seed)
        at_steps = {step: survival.kill_at(*((step, count) for count in COUNTS)) for step in STEPS}
        (folder / "needed").mkdir()
        needed = Survival(nursery, folder / "needed", folder / "model", keep="needed")
        needed_tally = needed.random_kills(options.kills // 5, options.seed + 1)
        at_drops = {step: needed.kill_at(*((step, count) for count in COUNTS)) for step in DROP_STEPS}
    results: dict[str, Any] = {
        "undisturbed_s": survival.seconds,
        "files_compared": len(survival.expected),
        "random": {**vars(tally), "kills": len(tally.instants_s)},
        "kills_at_steps": at_steps,
        "keep_needed": {**vars(needed_tally), "kills": len(needed_tally.instants_s), "kills_at_steps": at_drops},
        "all_equal": tally.equal == tally.films and needed_tally.equal == needed_tally.films,
    }
    record.write(options.json, "survival", {"kills": options.kills, "seed": options.seed, "film": FILM}, results)


if __name__ == "__main__":
    main()
