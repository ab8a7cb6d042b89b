"""``longtake bench endurance``: an hour-long shot with little memory: does memory or the time of a block grow?

Protocol: one shot through the whole engine (denoising, encoded history with its disk tier, latents, VAE, segments of
video) under a host budget of a part of its history, 1/20 by default. After every block the process's resident bytes,
the device allocator's, and the seconds since the block before are noted, of the clock and of the processor (which other
work on the machine hardly lengthens). Slopes are least squares over the blocks after
the first tenth, when windows, pools and queues have filled; beside them medians by tenth of the shot. Without a model:
random weights, 32x48 pixels, some 8 s a minute of film on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from longtake.engine import record
from longtake.engine.config import BeatConfig, CacheConfig, HistoryConfig, ModelConfig, ShotConfig
from longtake.engine.random_model import write_random_model
from longtake.engine.shot import BlockProgress, ShotRenderer
from longtake.engine.shotcache import kv_shape
from longtake.engine.shotfolder import METRICS_NAME
from longtake.engine.timeline import Timeline
from longtake.engine.weights import find_model, read_spec

RANDOM = ModelConfig(num_heads=4, head_dim=64, num_layers=4, ffn_dim=256, text_dim=32, freq_dim=32)
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnduranceBench:
    """What to run; ``model`` None is one with random weights."""

    model: str | None = None
    device: str = "cpu"
    minutes: float = 60.0
    codec: str = "bf16"
    sink_blocks: int = 1
    recent_blocks: int = 6
    host_part: float = 1 / 20


class Samples:
    """What is noted after each block; the renderer's progress callback."""

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self._device, self._num_blocks = device, num_blocks
        self._last_s, self._last_cpu_s = time.perf_counter(), time.process_time()
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.rss_bytes: list[int] = []
        self.device_bytes: list[int] = []

    def __call__(self, progress: BlockProgress) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        self.seconds.append(now - self._last_s)
        self.cpu_seconds.append(cpu - self._last_cpu_s)
        self._last_s, self._last_cpu_s = now, cpu
        self.rss_bytes.append(resident_bytes())
        if self._device.type == "cuda":
            self.device_bytes.append(torch.cuda.memory_allocated(self._device))
        if progress.block % max(1, self._num_blocks // 20) == 0:
            rss = self.rss_bytes[-1] / 2**20
            print(f"block {progress.block}/{self._num_blocks}, {self.seconds[-1]:.3f} s, {rss:.1f} MiB", flush=True)


def resident_bytes() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def make_shot(bench: EnduranceBench, model: Path) -> ShotConfig:
    """The shot, with its host budget."""
    spec = read_spec(str(model))
    history = HistoryConfig(sink_blocks=bench.sink_blocks, recent_blocks=bench.recent_blocks)
    shot = ShotConfig(
        name="hour",
        model=spec,
        num_frames=round(bench.minutes * 60 * spec.fps),
        fps=spec.fps,
        height=spec.height,
        width=spec.width,
        seed=0,
        beats=(BeatConfig(at_s=0, prompt="pan right slowly past the lighthouse"),),
        sampler=spec.sampler,
        history=history,
        cache=CacheConfig(codec=bench.codec),
    )
    budget = int(history_bytes(shot) * bench.host_part)
    return dataclasses.replace(shot, cache=CacheConfig(codec=bench.codec, host_bytes=budget))


def history_bytes(shot: ShotConfig) -> int:
    """Bytes of the whole encoded history."""
    return Timeline(shot, 0).num_entries * kv_shape(shot).block_bytes


def run_endurance(bench: EnduranceBench, work: Path) -> dict[str, Any]:
    """Render the shot below ``work``.

    Returns:
        Slopes, medians by tenth, bytes by name at the start and at the end, seconds stalled.
    """
    model = (
        find_model(bench.model)
        if bench.model
        else write_random_model(work / "model", transformer=RANDOM, block_frames=3, fps=16)
    )
    shot = make_shot(bench, model)
    samples = Samples(shot.num_blocks, torch.device(bench.device))
    started = time.perf_counter()
    result = ShotRenderer()(shot, work / shot.name, bench.device, stop=lambda: False, progress=samples)
    assert result.finished
    total_s = time.perf_counter() - started
    lines = (work / shot.name / METRICS_NAME).read_text().splitlines()
    first, last = json.loads(lines[len(lines) // 10]), json.loads(lines[-1])
    return {
        "film_s": shot.num_frames / shot.fps,
        "blocks": shot.num_blocks,
        "total_s": total_s,
        "history_bytes": history_bytes(shot),
        "host_budget_bytes": shot.cache.host_bytes,
        "block_s": trend(samples.seconds),
        "block_cpu_s": trend(samples.cpu_seconds),
        "rss_bytes": trend(samples.rss_bytes),
        "device_bytes": trend(samples.device_bytes) if samples.device_bytes else None,
        "memory_after_a_tenth": first["memory"],
        "memory_at_the_end": last["memory"],
        "cache": {key: value for key, value in last.items() if key.endswith(("_s", "num_read", "num_written"))},
        "disk_bytes": sum(path.stat().st_size for path in (work / shot.name).rglob("*") if path.is_file()),
        "segments": len(result.segments),
    }


def trend(values: list[float] | list[int]) -> dict[str, Any]:
    """Slope a block after the first tenth, what it comes to over the whole shot as a part of the median; medians."""
    samples: npt.NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    steady = samples[len(samples) // 10 :]
    slope = float(np.polyfit(np.arange(len(steady)), steady, 1)[0]) if len(steady) > 1 else 0.0
    median = float(np.median(steady))
    return {
        "median": median,
        "slope_a_block": slope,
        "growth_over_the_shot": slope * len(samples) / median,
        "medians_by_tenth": [float(np.median(part)) for part in np.array_split(samples, min(10, len(samples)))],
        "largest": float(samples.max()),
    }


def main(arguments: list[str]) -> None:
    """Command line of ``longtake bench endurance``."""
    defaults = EnduranceBench()
    parser = argparse.ArgumentParser(prog="longtake bench endurance", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", help="a name or a folder; default: random weights")
    parser.add_argument("--device", default=defaults.device)
    parser.add_argument("--minutes", type=float, default=defaults.minutes)
    parser.add_argument("--codec", default=defaults.codec)
    parser.add_argument("--recent", type=int, default=defaults.recent_blocks, help="blocks of the window")
    parser.add_argument("--host-part", type=float, default=defaults.host_part, help="host budget / bytes of history")
    parser.add_argument("--work", type=Path, help="where the shot goes; default: a temporary folder")
    options = parser.parse_args(arguments)
    bench = EnduranceBench(
        model=options.model,
        device=options.device,
        minutes=options.minutes,
        codec=options.codec,
        recent_blocks=options.recent,
        host_part=options.host_part,
    )
    work = Path(tempfile.mkdtemp(prefix="endurance", dir=options.work))
    try:
        result = run_endurance(bench, work)
    finally:
        shutil.rmtree(work)
    record.write(options.json, "endurance", dataclasses.asdict(bench), result)
    for name in ("block_s", "block_cpu_s", "rss_bytes"):
        print(
            f"{name}: median {result[name]['median']:.4g}, growth {100 * result[name]['growth_over_the_shot']:+.2f} %"
        )
