"""``longtake bench tiers``: what history outside the device costs, and how fast the tiers below it are.

Protocol. A published model's geometry with random weights; a window of history that is full from the start (its blocks
are copies of one encoded block); all steps and the commit pass of each block, without the VAE. Seconds a block are
medians, the device awaited after each block.

streaming    the same rollout with all of the attended history on the device; with a device arena of a quarter of it;
             with the smallest arena that works, so that all of it is on the host. Histories beyond the arena stream
             from pinned memory, every pass. Blocks of the three are rendered in turns. No disk.
persistence  the rollout with everything resident, without a disk, and with what a render keeps: history to the disk
             and journaled, latents written by a thread. Their ratio is what being able to go on costs; with it the lag
             from the end of a commit until the block is durable, and seconds stalled.
disk         the disk's own speed at files of the history's size (1.3B geometry at 480x832, whatever is rendered):
             fsynced writes, and reads behind a forgotten page cache; spill and prefetch of the cache on the same disk
             in the same run. See engine/tiers_disk.py.
resume       seconds from opening the folder of a run of ``--minutes`` until its next block is there: journal, tiers
             (allocation and pinning), the attended history read from the disk (behind a forgotten page cache), the
             block. Model and compilation are there before. The folder keeps what is needed only, so its journal is as
             long, and its history as short, as such a run's.

Figures are written case by case; a case that fails is printed, and listed in the file's "failed".
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longtake.engine import record
from longtake.engine.bench_rollout import GEOMETRIES, RolloutBench, make_shot, random_model
from longtake.engine.config import ModelConfig, ShotConfig
from longtake.engine.latents import LatentLog
from longtake.engine.model import TextContext
from longtake.engine.rollout import Rollout
from longtake.engine.shotcache import kv_shape, shot_forms
from longtake.engine.tiers_disk import bench_disk
from longtake.engine.tiers_resume import bench_resume
from longtake.engine.timing import await_device
from longtake.kernels.clock import survive
from longtake.kernels.codec import BlockGeometry, make_codec
from longtake.offload.cache import CacheBudget, KVCache
from longtake.offload.chunkfiles import DiskIO
from longtake.offload.run import RunDirectory
from longtake.offload.shape import ModelKVShape

PARTS = ("streaming", "persistence", "disk", "resume")
# As small as streams at all: the ring takes two layers of what is attended.
SMALL = ModelConfig(num_heads=2, head_dim=64, num_layers=12, ffn_dim=256, text_dim=64)
_WARM_UP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TiersBench:
    """What to run.

    Args:
        geometry: "small", or one of the rollout benchmark's.
        codec: of the history.
        window_blocks: attended.
        blocks: timed, of each case.
        parts: of PARTS.
        ways: how the disk is reached.
        disk_blocks: written and read in each pass, of the 1.3B geometry's size whatever is rendered.
        passes: over the disk.
        minutes: of the run that is gone on with.
    """

    geometry: str = "1.3b"
    codec: str = "int4"
    window_blocks: int = 24
    blocks: int = 6
    parts: tuple[str, ...] = PARTS
    ways: tuple[DiskIO, ...] = (DiskIO.SYSTEM, DiskIO.DEEPNVME)
    disk_blocks: int = 12
    passes: int = 5
    minutes: float = 10.0
    compile_layers: bool = True
    device: str = "cuda"


class Stage:
    """One model and what rollouts of it need."""

    def __init__(self, bench: TiersBench) -> None:
        self.bench, self.device = bench, torch.device(bench.device)
        self.cuda = self.device.type == "cuda"
        self.shot = bench_shot(bench)
        self.shape, self.codec = kv_shape(self.shot), shot_forms(self.shot)[0].codec
        self.model = random_model(
            self.shot.model.transformer, self.device, torch.bfloat16 if self.cuda else torch.float32
        )
        if self.cuda and bench.compile_layers:
            self.model.compile_layers()
        self._template: list[torch.Tensor] = []

    def context(self) -> TextContext:
        """Cross-attention to text of random numbers."""
        text = torch.randn(1, self.shot.model.text_len, self.model.config.text_dim, device=self.device)
        with torch.inference_mode():
            return self.model.text_context(text)

    def cache(self, num_frames: int, run: RunDirectory | None = None, *, host: bool = False) -> KVCache:
        """A cache with an arena of so many blocks; ``host``: with room for the history in host memory."""
        size, window = self.shape.block_bytes, self.bench.window_blocks
        budget = CacheBudget(
            device_bytes=num_frames * size,
            num_blocks=window,
            host_bytes=(window + 4) * size if host else None,
        )
        return KVCache(shape=self.shape, device=self.device, budget=budget, run=run)

    @torch.inference_mode()
    def fill(self, cache: KVCache, num_blocks: int) -> None:
        """Commit copies of one encoded block until the cache has so many."""
        if not self._template:
            config, tokens = self.shot.model.transformer, self.shot.tokens_per_block
            dtype = self.model.proj_out.weight.dtype
            size = (tokens, config.num_heads, config.head_dim)
            self._template = []
            for layer in range(self.shape.num_layers):
                page = (self.shape.num_heads, self.shape.payload_bytes(layer))
                self._template.append(torch.empty(page, dtype=torch.uint8, device=self.device))
                k_THD, v_THD = (torch.randn(size, dtype=dtype, device=self.device) for _ in range(2))
                self.codec.encode(k_THD, v_THD, self._template[layer])
        for block in range(cache.num_committed, num_blocks):
            commit = cache.begin_commit(block)
            for layer in range(self.shape.num_layers):
                commit.page(layer).copy_(self._template[layer])
            commit.complete()

    def rollout(self, cache: KVCache) -> Rollout:
        """A rollout whose next block attends a whole window."""
        return Rollout(self.shot, self.model, [self.context()], cache)

    def wait(self) -> None:
        """Await the device."""
        await_device(self.device)

    def timed(self, step: Callable[[], object]) -> float:
        """Seconds of a step, the device awaited."""
        self.wait()
        started = time.perf_counter()
        step()
        self.wait()
        return time.perf_counter() - started

    @property
    def least_frames(self) -> int:
        """The smallest arena that streams the window: a ring of two layers, and the block being committed."""
        return 1 + -(-2 * self.bench.window_blocks // self.shape.pages_a_frame)


def bench_shot(bench: TiersBench) -> ShotConfig:
    """An hour of the benchmark's model."""
    small = bench.geometry == "small"
    shot = make_shot(
        RolloutBench(
            geometry="tiny" if small else bench.geometry,
            codec=bench.codec,
            window_blocks=bench.window_blocks,
            height=64 if small else 0,
            width=64 if small else 0,
            device=bench.device,
        )
    )
    return dataclasses.replace(shot, model=dataclasses.replace(shot.model, transformer=SMALL)) if small else shot


def bench_streaming(stage: Stage, failed: dict[str, str]) -> dict[str, Any]:
    """Seconds a block by where the attended history is; ``failed`` is told of a history that finds no room."""
    window = stage.bench.window_blocks
    frames = {"resident": window + 1, "quarter": max(window // 4, stage.least_frames), "host": stage.least_frames}
    rollouts: dict[str, Rollout] = {}
    for name, num_frames in frames.items():
        with survive(failed, f"streaming, {name}"):
            cache = stage.cache(num_frames, host=name != "resident")
            stage.fill(cache, window)
            rollouts[name] = stage.rollout(cache)
    seconds: dict[str, list[float]] = {name: [] for name in rollouts}
    streamed: dict[str, list[int]] = {name: [] for name in rollouts}
    for index in range(_WARM_UP + stage.bench.blocks):
        for name, rollout in rollouts.items():
            if f"streaming, {name}" in failed:
                continue
            with survive(failed, f"streaming, {name}"):
                before = rollout.cache.stats().up_bytes
                taken = stage.timed(rollout.step)
                if index >= _WARM_UP:
                    seconds[name].append(taken)
                    streamed[name].append(rollout.cache.stats().up_bytes - before)
    results: dict[str, Any] = {"attended_bytes": window * stage.shape.block_bytes}
    for name, rollout in rollouts.items():
        if f"streaming, {name}" not in failed:
            results[name] = {
                "block_s": record.summary(seconds[name]),
                "up_bytes_a_block": statistics.median(streamed[name]),
                "memory_bytes": rollout.memory(),
            }
        if name in results and "resident" in results:
            pairs = zip(seconds[name], seconds["resident"], strict=True)
            results[name]["to_resident"] = record.summary([one / resident for one, resident in pairs])
        rollout.close()
        rollout.cache.close()
    return results


def bench_persistence(stage: Stage, work: Path) -> dict[str, Any]:
    """What keeping everything costs, and how far the disk is behind."""
    window, shot = stage.bench.window_blocks, stage.shot
    plain_cache = stage.cache(window + 1)
    plain = stage.rollout(plain_cache)
    run = RunDirectory(work / "kept", shape=stage.shape, config_hash="bench", disk_io=stage.bench.ways[-1])
    kept_cache = stage.cache(window + 1, run)
    kept = stage.rollout(kept_cache)
    latents = LatentLog(work / "kept" / "latents.zarr", shot.num_blocks, shot.latent_shape)
    stage.fill(plain_cache, window)
    stage.fill(kept_cache, window)
    kept.cache.flush()
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    lags_s: dict[int, float] = {}
    with ThreadPoolExecutor(1) as emitter:

        def rest(due: bool) -> None:
            if due:
                kept.cache.flush()
                emitter.submit(lambda: None).result()

        kept.rest = rest

        def step() -> None:
            block = kept.next_block
            emitter.submit(latents.write, block, kept.step()).add_done_callback(lambda done: done.result())

        for index in range(_WARM_UP + stage.bench.blocks):
            if index == _WARM_UP:
                began = kept.cache.stats()
            pair = {"without": stage.timed(plain.step), "with": stage.timed(step)}
            counted = kept.cache.stats()
            if index >= _WARM_UP:
                lags_s[counted.num_written] = counted.last_lag_s
                for name, taken in pair.items():
                    seconds[name].append(taken)
    ended = kept.cache.stats()
    for rollout in (plain, kept):
        rollout.close()
        rollout.cache.close()
    run.close()
    ratios = [one / other for one, other in zip(seconds["with"], seconds["without"], strict=True)]
    num_blocks = len(seconds["with"])
    return {
        "disk": run.store.files.name,
        "block_s": {name: record.summary(samples) for name, samples in seconds.items()},
        "with_to_without": record.summary(ratios),
        "lag_s": record.summary(list(lags_s.values())),
        "stalled_s_a_block": {
            "for_the_host": (ended.stalled_host_s - began.stalled_host_s) / num_blocks,
            "for_the_disk": (ended.stalled_disk_s - began.stalled_disk_s) / num_blocks,
        },
    }


def disk_shape(codec: str) -> ModelKVShape:
    """History of the 1.3B geometry at 480x832: the files of every part about the disk."""
    shot = make_shot(RolloutBench(geometry="1.3b", codec=codec))
    head_dim = shot.model.transformer.head_dim
    geometry = BlockGeometry(num_tokens=shot.tokens_per_block, head_dim=head_dim, grid=shot.grid)
    config = shot.model.transformer
    return ModelKVShape(num_layers=config.num_layers, num_heads=config.num_heads, codec=make_codec(codec, geometry))


def run_tiers(
    bench: TiersBench,
    work: Path,
    failed: dict[str, str],
    save: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Run the parts.

    Args:
        bench: which, and of what.
        work: a folder on the disk to be measured.
        failed: told of cases that fail; the others run.
        save: given the results so far, case by case.
    """
    results: dict[str, Any] = {}
    stage = Stage(bench) if set(bench.parts) - {"disk"} else None

    def disk() -> dict[str, Any]:
        found = results["disk"] = {}
        shape, device = disk_shape(bench.codec), torch.device(bench.device)
        for way in bench_disk(found, shape, device, work, bench.ways, failed, bench.disk_blocks, bench.passes):
            print(f"disk by {way}: {found[way]['write_MB_s']['median']:.0f} MB/s written", flush=True)
            save(results)
        return found

    parts: dict[str, Callable[[Stage], dict[str, Any]]] = {
        "streaming": lambda one: bench_streaming(one, failed),
        "persistence": lambda one: bench_persistence(one, work),
        "resume": lambda one: bench_resume(one, work),
    }
    for name in bench.parts:
        started = time.perf_counter()
        with survive(failed, name):
            results[name] = disk() if stage is None or name == "disk" else parts[name](stage)
            results[name]["took_s"] = time.perf_counter() - started
            print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
        save(results)
    return results


def main(arguments: list[str]) -> int:
    """Command line of ``longtake bench tiers``."""
    parser = argparse.ArgumentParser(
        prog="longtake bench tiers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    default = TiersBench() if cuda else TiersBench(geometry="small", device="cpu")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--geometry", choices=["small", *sorted(GEOMETRIES)], default=default.geometry)
    parser.add_argument("--codec", default=default.codec)
    parser.add_argument("--window", type=int, default=default.window_blocks, help="blocks attended")
    parser.add_argument("--blocks", type=int, default=default.blocks, help="timed blocks of each case")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--disk-io", default="system,deepnvme", help="system, deepnvme (built if need be), auto")
    parser.add_argument("--disk-blocks", type=int, default=default.disk_blocks, help="of the 1.3B size, each pass")
    parser.add_argument("--passes", type=int, default=default.passes, help="over the disk")
    parser.add_argument("--minutes", type=float, default=default.minutes, help="of the run that is gone on with")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--work", type=Path, help="a folder on the disk to be measured; default: temporary files'")
    options = parser.parse_args(arguments)
    if options.disk_blocks < 2:
        parser.error(f"--disk-blocks {options.disk_blocks}: a rate needs two blocks or more")
    bench = TiersBench(
        geometry=options.geometry,
        codec=options.codec,
        window_blocks=options.window,
        blocks=options.blocks,
        parts=tuple(options.parts.split(",")),
        ways=tuple(DiskIO(way) for way in options.disk_io.split(",")),
        disk_blocks=options.disk_blocks,
        passes=options.passes,
        minutes=options.minutes,
        compile_layers=not options.no_compile,
        device=options.device,
    )
    work = Path(tempfile.mkdtemp(prefix="tiers", dir=options.work))
    failed: dict[str, str] = {}
    config = {**dataclasses.asdict(bench), "protocol": __doc__, "failed": failed}
    try:
        run_tiers(bench, work, failed, lambda results: record.write(options.json, "tiers", config, results))
    finally:
        shutil.rmtree(work)
    return 1 if failed else 0
