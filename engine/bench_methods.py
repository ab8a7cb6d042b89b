"""``longtake bench methods``: the map of ways to keep a history (engine/methods.toml), on the shipped model.

Protocol. Every method renders the same shots: the same prompts, noise, window (the model's own) and weights; keys are
stored before RoPE and grids are asymmetric for all of them, the study's baselines included. Two questions are asked.

film: a film from the prompt alone is rendered, and compared frame by frame with the one that keeps its history in
bfloat16. Small errors grow, as each block builds on what the last ones show.

past: the true film of a held-out world up to a moment is committed as history, and the blocks after it are generated
and compared with bfloat16's, and with the world itself. From one turn of the camera on (8 s) what they show was seen
before, and only the history can tell how it looked: these are return visits. Nothing grows here.

ratio is bfloat16's bytes over the method's, as the caches of the film hold them: the arenas of all forms, with room for
the block being committed, allocated once and so the same at every moment. bits are 16 / ratio; encoded_bits those of
the first form's payloads; minute_ratio is the ratio for a film of a minute, by arithmetic. peak is what the allocator
of one process gave out at once on a GPU, the VAE included, and on a CPU the sum of weights, text, scratch and cache;
memory_bytes name what recorded passes keep beside, where a codec has kernels that can be recorded. PSNR (dB) and SSIM
are means over worlds, in a film over the frames of the second that ends at a moment, behind a past over two blocks.
block_s, seconds a block, is measured when all that is done, by one process on each GPU: four blocks behind a full
window in the first world, after three that are not timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from longtake.engine import record
from longtake.engine.bench_memory import FIRST_SEED
from longtake.engine.crew import Crew
from longtake.engine.methods import Method, methods
from longtake.engine.methods_stage import PAN_PX, PAST_BLOCKS, REFERENCE, Part, StageConfig, Task, moments
from longtake.engine.weights import read_spec
from longtake.kernels.errors import ConfigError, WorkerError

Row = dict[str, Any]


def summary(method: Method, worlds: Sequence[Row], dense: Sequence[Row], seconds: float) -> Row:
    """One method's row of the map; units are in the names.

    Args:
        method: whose.
        worlds: what it made of each.
        dense: likewise of bfloat16.
        seconds: of the films.
    """
    ratio = history_bytes(dense[0]["memory_bytes"]) / history_bytes(worlds[0]["memory_bytes"])
    return {
        "group": method.group,
        "settings": method.line,
        "ratio": ratio,
        "bits": 16 / ratio,
        "encoded_bits": worlds[0]["encoded_bits"],
        "minute_ratio": dense[0]["minute_bytes"] / worlds[0]["minute_bytes"],
        "history_bytes": history_bytes(worlds[0]["memory_bytes"]),
        "memory_bytes": worlds[0]["memory_bytes"],
        "peak_bytes": max(world["peak_bytes"] for world in worlds),
        "film": _film(worlds, seconds),
        "past": {moment: _past([world["past"][moment] for world in worlds]) for moment in worlds[0]["past"]},
    }


def history_bytes(memory: Mapping[str, int]) -> int:
    """What the cache holds, all forms and tables."""
    return sum(size for name, size in memory.items() if name.startswith("device"))


def _film(worlds: Sequence[Row], seconds: float) -> Row:
    curves = {name: [world["film"][name] for world in worlds] for name in worlds[0]["film"]}
    by_second = {name: [fmean(second) for second in zip(*found, strict=True)] for name, found in curves.items()}
    at = {
        str(moment): {name: curve[min(moment, len(curve)) - 1] for name, curve in by_second.items()}
        for moment in moments(seconds)
    }
    return {"at": at, "by_second": by_second}


def _past(worlds: Sequence[Mapping[str, float]]) -> Row:
    means = {name: fmean(world[name] for world in worlds) for name in worlds[0]}
    return {**means, "world_psnr_db_by_world": [world["world_psnr_db"] for world in worlds]}


def chosen(names: str | None) -> list[Method]:
    """The methods of a comma-separated list of names and groups, all without one; the reference is always the first.

    Raises:
        ConfigError: one is unknown.
    """
    known = methods()
    found = {REFERENCE: known[REFERENCE]}
    for name in known if names is None else names.split(","):
        of_name = {key: method for key, method in known.items() if name in (key, method.group)}
        if not of_name:
            raise ConfigError(f"--methods: {name!r} is no method and no group; known: {', '.join(known)}")
        found.update(of_name)
    return list(found.values())


def _done(path: Path, config: dict[str, Any]) -> dict[str, Row]:
    """Rows of an earlier run of the same protocol.

    Raises:
        ConfigError: the file is of another one.
    """
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
        for of_the_run in ("failed", "processes"):
            data["config"].pop(of_the_run, None)
        if data["config"] == json.loads(json.dumps(config)):
            return dict(data["results"])
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"--json {path}: holds figures of other settings; name another file or remove it")


class Map:
    """The rows so far, in a file that is written after each method.

    Args:
        path: of the JSON.
        config: of the protocol: model, device, seconds, seeds.
        processes: that measure.
    """

    def __init__(self, path: Path, config: dict[str, Any], processes: int) -> None:
        self._path, self._config, self._processes = path, config, processes
        self.results = _done(path, config)
        self.failed: dict[str, str] = {}
        self._seeds = range(FIRST_SEED, FIRST_SEED + config["seeds"])
        self._worlds: dict[str, dict[int, Row]] = {}

    def measure(self, wanted: Sequence[Method]) -> None:
        """Measure what the file does not have yet; a method that fails is noted and the others are measured.

        Raises:
            WorkerError: the reference failed, with which all are compared.
        """
        names = [method.name for method in wanted]
        missing = [name for name in names if name not in self.results]
        if not missing and all("block_s" in self.results[name] for name in names):
            return
        with TemporaryDirectory(prefix="longtake-methods-") as folder:
            config = {key: self._config[key] for key in ("model", "device", "seconds")}
            make = StageConfig(**config, folder=Path(folder))
            size = self._processes if self._processes > 1 else 0
            with Crew[Task, Row](make, size) as crew:
                worlds = self._seeds if missing else self._seeds[:1]
                self._collect(crew, [_task(REFERENCE, seed, Part.REFERENCE) for seed in worlds])
                if REFERENCE in self.failed:
                    raise WorkerError(f"{REFERENCE}: {self.failed[REFERENCE]}")
                others = [name for name in missing if name != REFERENCE]
                parts = (Part.FILM, Part.PAST)
                self._collect(crew, [_task(name, seed, part) for name in others for seed in worlds for part in parts])
                untimed = [name for name in methods() if name in self.results and "block_s" not in self.results[name]]
                timed = [_task(name, FIRST_SEED, Part.BLOCKS) for name in untimed]
                self._collect(crew, timed, at_once=make.num_devices)

    def _collect(self, crew: Crew[Task, Row], tasks: Sequence[Task], at_once: int | None = None) -> None:
        wanted = (task for task in tasks if task.method not in self.failed)  # looked at when a worker is free
        for task, found in crew.run(wanted, at_once):
            if isinstance(found, WorkerError):
                self.failed[task.method] = str(found)
            elif task.part is Part.BLOCKS:
                self.results[task.method]["block_s"] = record.summary(found["block_s"])
            else:
                worlds = self._worlds.setdefault(task.method, {})
                worlds.setdefault(task.seed, {}).update(found)
                if sum("film" in world and "past" in world for world in worlds.values()) < len(self._seeds):
                    continue
                self._add(methods()[task.method])
            self._write()

    def _add(self, method: Method) -> None:
        worlds, dense = ([self._worlds[name][seed] for seed in self._seeds] for name in (method.name, REFERENCE))
        row = summary(method, worlds, dense, self._config["seconds"])
        self.results[method.name] = {**row, **_timing(self.results.get(method.name, {}))}
        print(_line(method.name, row), flush=True)

    def _write(self) -> None:
        config = {**self._config, "processes": self._processes, "failed": self.failed}
        ordered = {name: self.results[name] for name in methods() if name in self.results}
        record.write(self._path, "methods", config, ordered)


def _task(method: str, seed: int, part: Part) -> Task:
    return Task(method=method, seed=seed, part=part)


def _timing(row: Row) -> Row:
    return {key: row[key] for key in ("block_s",) if key in row}


def _line(name: str, row: Row) -> str:
    film = ", ".join(f"{at} s {found['psnr_db']:.2f} dB {found['ssim']:.3f}" for at, found in row["film"]["at"].items())
    past = list(row["past"].values())[-1]
    return (
        f"{name}: ratio {row['ratio']:.2f}, film {film}; "
        f"past {past['bf16_psnr_db']:.2f} dB of bf16, {past['world_psnr_db']:.2f} dB of the world"
    )


def main(arguments: list[str]) -> int:
    """Command line of ``longtake bench methods``."""
    parser = argparse.ArgumentParser(
        prog="longtake bench methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="run again with the same file to go on")
    parser.add_argument("--methods", help="names and groups (study, codecs, policies), with commas; default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the films")
    parser.add_argument("--seeds", type=int, default=4, help="worlds")
    parser.add_argument("--processes", type=int, default=1, help="that measure side by side, on all GPUs in turn")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the map; needs matplotlib")
    options = parser.parse_args(arguments)
    if options.seconds < 1 or options.seeds < 1 or options.processes < 1:
        raise ConfigError("--seconds, --seeds and --processes begin at 1")
    read_spec(options.model)
    config = {
        "protocol": __doc__,
        **{key: getattr(options, key) for key in ("model", "device", "seconds", "seeds")},
        "pan_px_a_frame": PAN_PX,
        "first_seed": FIRST_SEED,
        "past_blocks": PAST_BLOCKS,
    }
    found = Map(options.json, config, options.processes)
    found.measure(chosen(options.methods))
    if options.plots is not None:
        from longtake.engine.methods_plots import draw

        for path in draw(found.results, options.plots):
            print(path)
    return 1 if found.failed else 0
