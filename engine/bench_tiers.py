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
             (allocation and pinning), the attended history read from the disk, the block. Model and compilation are
             there before. The folder keeps what is needed only, so its journal is as long, and its history as short,
             as such a run's.
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

import numpy as np
import torch

from longtake.engine import record
from longtake.engine.bench_rollout import GEOMETRIES, RolloutBench, make_shot, random_model
from longtake.engine.config import ModelConfig, ShotConfig
from longtake.engine.latents import LatentLog
from longtake.engine.model import TextContext
from longtake.engine.rollout import Rollout
from longtake.engine.shotcache import kv_shape, shot_forms
from longtake.engine.tiers_disk import bench_disk
from longtake.kernels.codec import BlockGeometry, make_codec
from longtake.offload.cache import CacheBudget, KVCache
from longtake.offload.chunkfiles import DiskIO
from longtake.offload.files import FileOps
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
        self._template_LHP: torch.Tensor | None = None

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
        if self._template_LHP is None:
            config, tokens = self.shot.model.transformer, self.shot.tokens_per_block
            dtype = self.model.proj_out.weight.dtype
            size = (tokens, config.num_heads, config.head_dim)
            page = (self.shape.num_layers, self.shape.num_heads, self.shape.payload_bytes)
            pages_LHP = torch.empty(page, dtype=torch.uint8, device=self.device)
            for layer, page_HP in enumerate(pages_LHP):
                k_THD, v_THD = (torch.randn(size, dtype=dtype, device=self.device) for _ in range(2))
                self.codec.encode(k_THD, v_THD, page_HP, block=0, layer=layer, first_head=0)
            self._template_LHP = pages_LHP
        for block in range(cache.num_committed, num_blocks):
            commit = cache.begin_commit(block)
            for layer in range(self.shape.num_layers):
                commit.page(layer).copy_(self._template_LHP[layer])
            commit.complete()

    def rollout(self, cache: KVCache) -> Rollout:
        """A rollout whose next block attends a whole window."""
        return Rollout(self.shot, self.model, [self.context()], cache)

    def wait(self) -> None:
        """Await the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

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
        return 1 + -(-2 * self.bench.window_blocks // self.shape.num_layers)


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


def bench_streaming(stage: Stage) -> dict[str, Any]:
    """Seconds a block by where the attended history is."""
    window = stage.bench.window_blocks
    frames = {"resident": window + 1, "quarter": max(window // 4, stage.least_frames), "host": stage.least_frames}
    rollouts: dict[str, Rollout] = {}
    for name, num_frames in frames.items():
        cache = stage.cache(num_frames, host=name != "resident")
        stage.fill(cache, window)
        rollouts[name] = stage.rollout(cache)
    seconds: dict[str, list[float]] = {name: [] for name in frames}
    streamed: dict[str, list[int]] = {name: [] for name in frames}
    for index in range(_WARM_UP + stage.bench.blocks):
        for name, rollout in rollouts.items():
            before = rollout.cache.stats().up_bytes
            taken = stage.timed(rollout.step)
            if index >= _WARM_UP:
                seconds[name].append(taken)
                streamed[name].append(rollout.cache.stats().up_bytes - before)
    results: dict[str, Any] = {}
    for name, rollout in rollouts.items():
        ratios = [one / resident for one, resident in zip(seconds[name], seconds["resident"], strict=True)]
        results[name] = {
            "block_s": record.summary(seconds[name]),
            "to_resident": record.summary(ratios),
            "up_bytes_a_block": statistics.median(streamed[name]),
            "memory_bytes": rollout.memory(),
        }
        rollout.cache.close()
    return {"attended_bytes": window * stage.shape.block_bytes, **results}


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
    for cache in (plain.cache, kept.cache):
        cache.close()
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


class _Unsynced(FileOps):
    """For making a long run's folder: it only has to be there."""

    def fsync(self, fd: int) -> None:
        """Nothing."""


def bench_resume(stage: Stage, work: Path) -> dict[str, Any]:
    """Seconds from a folder to its next block."""
    shot, window, shape = stage.shot, stage.bench.window_blocks, stage.shape
    frames = shot.model.block_frames * shot.model.temporal_stride
    num_blocks = max(window, round(60 * stage.bench.minutes * shot.fps / frames))
    needed = (0, *range(num_blocks - window + 1, num_blocks))
    _make_run(stage, work / "resumed", num_blocks, needed)
    samples: list[dict[str, float]] = []
    for _ in range(3):
        shutil.copytree(work / "resumed", work / "again")
        samples.append(_resume(stage, work / "again", needed))
        shutil.rmtree(work / "again")
    return {
        "run_minutes": stage.bench.minutes,
        "run_blocks": num_blocks,
        "journal_bytes": (work / "resumed" / "journal").stat().st_size,
        "history_read_bytes": len(needed) * shape.block_bytes,
        **{name: record.summary([one[name] for one in samples]) for name in samples[0]},
    }


def _make_run(stage: Stage, folder: Path, num_blocks: int, needed: tuple[int, ...]) -> None:
    """The folder of a run of so many blocks that keeps the needed ones."""
    run = RunDirectory(folder, shape=stage.shape, config_hash="bench", ops=_Unsynced())
    payloads_LHP = np.random.default_rng(0).integers(
        0, 256, (stage.shape.num_layers, stage.shape.num_heads, stage.shape.payload_bytes), dtype=np.uint8
    )
    checksums_LH = np.zeros((stage.shape.num_layers, stage.shape.num_heads), dtype=np.uint32)
    for block in range(num_blocks):
        for chunk in run.store.chunks if block in needed else ():
            heads = slice(chunk.heads.start, chunk.heads.stop)
            written_lh = run.store.write_chunk(block, chunk, payloads_LHP)
            checksums_LH[chunk.layers.start : chunk.layers.stop, heads] = written_lh
        run.commit(block, checksums_LH)
    run.drop(set(range(num_blocks)) - set(needed))
    run.close()


def _resume(stage: Stage, folder: Path, needed: tuple[int, ...]) -> dict[str, float]:
    times = [time.perf_counter()]
    run = RunDirectory(folder, shape=stage.shape, config_hash="bench", disk_io=stage.bench.ways[-1])
    times.append(time.perf_counter())
    cache = stage.cache(stage.bench.window_blocks + 1, run)
    stage.wait()
    times.append(time.perf_counter())
    cache.prepare(needed).release()
    stage.wait()
    times.append(time.perf_counter())
    stage.rollout(cache).step()
    stage.wait()
    times.append(time.perf_counter())
    cache.flush()
    times.append(time.perf_counter())
    cache.close()
    run.close()
    names = ("journal_s", "tiers_s", "history_s", "block_s", "until_durable_s")
    parts = {name: later - earlier for name, earlier, later in zip(names, times, times[1:], strict=False)}
    return {**parts, "first_block_s": times[4] - times[0]}


def disk_shape(codec: str) -> ModelKVShape:
    """History of the 1.3B geometry at 480x832: the files of every part about the disk."""
    shot = make_shot(RolloutBench(geometry="1.3b", codec=codec))
    geometry = BlockGeometry(num_tokens=shot.tokens_per_block, head_dim=shot.model.transformer.head_dim)
    config = shot.model.transformer
    return ModelKVShape(num_layers=config.num_layers, num_heads=config.num_heads, codec=make_codec(codec, geometry))


def run_tiers(bench: TiersBench, work: Path) -> dict[str, Any]:
    """Run the parts; ``work`` is a folder on the disk to be measured."""
    results: dict[str, Any] = {}
    stage = Stage(bench) if set(bench.parts) - {"disk"} else None
    parts: dict[str, Callable[[Stage], dict[str, Any]]] = {
        "streaming": bench_streaming,
        "persistence": lambda one: bench_persistence(one, work),
        "resume": lambda one: bench_resume(one, work),
    }
    for name in bench.parts:
        started = time.perf_counter()
        if name == "disk":
            results[name] = bench_disk(
                disk_shape(bench.codec),
                torch.device(bench.device),
                work,
                ways=list(bench.ways),
                num_blocks=bench.disk_blocks,
                passes=bench.passes,
            )
        else:
            assert stage is not None
            results[name] = parts[name](stage)
        results[name]["took_s"] = time.perf_counter() - started
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
    return results


def main(arguments: list[str]) -> None:
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
    try:
        results = run_tiers(bench, work)
    finally:
        shutil.rmtree(work)
    record.write(options.json, "tiers", {**dataclasses.asdict(bench), "protocol": __doc__}, results)
