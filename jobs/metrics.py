"""What a run exports through Ray: the node's metrics endpoint has each as ``ray_<name>``, counters with ``_total``.

Tags are few and short (film, shot, tier, name, state), never blocks or gangs, so that a long run keeps few series. The
figures of a block are read from the line that the engine has just written to DIR/<shot>/metrics.jsonl.
"""

from __future__ import annotations

import os
from collections import Counter as Count
from collections.abc import Mapping
from pathlib import Path

from ray.util.metrics import Counter, Gauge, Histogram

from longtake.jobs.blockrecord import BlockRecord, last_record
from longtake.jobs.orders import FilmView
from longtake.jobs.render import BlockProgress
from longtake.jobs.status import State

_BLOCK_SECONDS = [0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 60, 300]
_STALLS = {"commit": "stalled_host_s", "prepare": "stalled_disk_s"}
_COPIES = {"up": "up_bytes", "down": "down_bytes"}
_DISK = {"written": "written_bytes", "read": "read_bytes"}
_PREFETCH = {"hit": "num_hits", "miss": "num_misses"}


class GangMetrics:
    """What a gang's rank 0 tells of its shot after every block."""

    def __init__(self) -> None:
        by_film, by_shot = ("film",), ("film", "shot")
        self._blocks = Counter("longtake_blocks", "Blocks rendered.", by_shot)
        self._frames = Counter("longtake_frames", "Video frames decoded and written.", by_shot)
        self._fps = Gauge("longtake_frames_per_second", "Video frames a second of the last block.", by_shot)
        self._seconds = Histogram("longtake_block_seconds", "Seconds a block.", _BLOCK_SECONDS, by_film)
        self._stages = Counter("longtake_stage_seconds", "Seconds spent on blocks, by stage.", (*by_shot, "stage"))
        self._memory = Gauge("longtake_memory_bytes", "Bytes held by a gang's rank 0, by name.", (*by_shot, "name"))
        self._tier = Gauge("longtake_tier_bytes", "Bytes of history in a tier.", (*by_shot, "tier"))
        self._budget = Gauge("longtake_tier_budget_bytes", "The most that a tier may hold.", (*by_shot, "tier"))
        self._prefetch = Counter(
            "longtake_prefetch_blocks",
            "Blocks of history to be read: there, or not yet.",
            (*by_shot, "found"),
        )
        self._stalled = Counter("longtake_stalled_seconds", "Waited for the disk, by who waited.", (*by_shot, "by"))
        self._copied = Counter("longtake_copied_bytes", "History between host and device.", (*by_shot, "direction"))
        self._disk = Counter("longtake_disk_bytes", "History written to and read from disk.", (*by_shot, "direction"))
        self._lag = Gauge("longtake_journal_lag_seconds", "From a block's commit to its journal record.", by_shot)
        self._durable = Gauge("longtake_durable_blocks", "Blocks that a restart would find.", by_shot)
        self._key: tuple[str, str] | None = None
        self._last: dict[str, float] = {}

    def __call__(self, film: str, shot: str, folder: Path, block: BlockProgress) -> None:
        """A block is done, or (with ``seconds_block`` 0) a shot goes on."""
        tags = {"film": film, "shot": shot}
        if self._key != (film, shot):
            if self._key is not None:
                self._fps.set(0.0, dict(zip(("film", "shot"), self._key, strict=True)))
            self._key, self._last = (film, shot), {}
        if not block.seconds_block:
            self._last = {"frames": block.frames_done}
            return
        self._blocks.inc(1, tags)
        self._seconds.observe(block.seconds_block, {"film": film})
        frames = self._new("frames", block.frames_done)
        if frames > 0:
            self._frames.inc(frames, tags)
        self._fps.set(frames / block.seconds_block, tags)
        if (record := last_record(folder)) is not None:
            self._show(record, tags, folder)

    def _show(self, record: BlockRecord, tags: dict[str, str], folder: Path) -> None:
        for name, size in record.memory.items():
            self._memory.set(size, {**tags, "name": name})
        for tier, use in record.tiers.items():
            self._tier.set(use.used_bytes, {**tags, "tier": tier})
            room = _room(folder) if use.budget_bytes is None else None
            budget = use.budget_bytes if room is None else room + use.used_bytes
            if budget is not None:
                self._budget.set(budget, {**tags, "tier": tier})
        self._count(self._stages, "stage", {stage: stage for stage in record.stages_s}, record.stages_s, tags)
        for counter, tag, keys in (
            (self._prefetch, "found", _PREFETCH),
            (self._stalled, "by", _STALLS),
            (self._copied, "direction", _COPIES),
            (self._disk, "direction", _DISK),
        ):
            self._count(counter, tag, keys, record.totals, tags)
        self._lag.set(record.total("last_lag_s"), tags)
        self._durable.set(record.total("durable_blocks"), tags)

    def _count(
        self, counter: Counter, tag: str, keys: Mapping[str, str], totals: Mapping[str, float], tags: dict[str, str]
    ) -> None:
        """Add to a counter what totals have grown by; ``keys``: tag's value -> the total's name."""
        for value, key in keys.items():
            if (more := self._new(key, totals.get(key, 0.0))) > 0:
                counter.inc(more, {**tags, tag: value})

    def _new(self, key: str, value: float) -> float:
        """What a total has grown by since the last block; one that is smaller began anew."""
        last = self._last.get(key, 0.0)
        self._last[key] = value
        return value - last if value >= last else value


class FarmMetrics:
    """What the director tells of its films."""

    def __init__(self) -> None:
        self._shots = Gauge("longtake_shots", "Shots of a film by state.", ("film", "state"))
        self._done = Gauge("longtake_film_frames_done", "Video frames done.", ("film",))
        self._total = Gauge("longtake_film_frames", "Video frames of the whole film.", ("film",))
        self._devices = Gauge("longtake_devices_busy", "Devices that render a film now.", ("film",))
        self._hours = Gauge("longtake_gpu_hours", "Device hours spent on a film.", ("film",))
        self._restarts = Gauge("longtake_shot_restarts", "How often shots were begun again.", ("film",))
        self._failures = Gauge("longtake_shot_failures", "Failures since the last new block.", ("film",))

    def show(self, view: FilmView) -> None:
        """A film has changed."""
        tags, states = {"film": view.film.title}, Count(task.state for task in view.shots)
        for state in State:
            self._shots.set(states[state], {**tags, "state": str(state)})
        self._done.set(sum(task.frames_done for task in view.shots), tags)
        self._total.set(sum(task.num_frames for task in view.shots), tags)
        self._devices.set(sum(task.num_devices for task in view.tasks if task.leased), tags)
        self._hours.set(sum(task.gpu_s for task in view.tasks) / 3600, tags)
        self._restarts.set(sum(max(0, task.num_starts - 1) for task in view.shots), tags)
        self._failures.set(sum(task.num_failures for task in view.shots), tags)


def _room(folder: Path) -> int | None:
    """Bytes that the folder's file system has room for; None while it does not answer: no shot fails for a figure."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize
