"""What a run exports through Ray: the node's metrics endpoint has each as ``ray_<name>``, counters with ``_total``.

Tags are few and short (film, shot, tier, name, state), never blocks or gangs, so that a long run keeps few series. The
figures of a block are read from the line that the engine has just written to DIR/<shot>/metrics.jsonl.
"""

from __future__ import annotations

import json
import os
from collections import Counter as Count
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from longtake.jobs.orders import FilmView
from longtake.jobs.render import BlockProgress
from longtake.jobs.status import State

METRICS_NAME = "metrics.jsonl"
_TAIL_BYTES = 1 << 16
_BLOCK_SECONDS = [0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 60, 300]
_TIERS = ("device", "host")
_STALLS = {"commit": "stalled_host_s", "prepare": "stalled_disk_s"}
_COPIES = {"up": "up_bytes", "down": "down_bytes"}
_BLOCKS_MOVED = {"written": "num_written", "read": "num_read"}


class GangMetrics:
    """What a gang's rank 0 tells of its shot after every block."""

    def __init__(self) -> None:
        by_film, by_shot = ("film",), ("film", "shot")
        self._blocks = Counter("longtake_blocks", "Blocks rendered.", by_shot)
        self._frames = Counter("longtake_frames", "Video frames decoded and written.", by_shot)
        self._fps = Gauge("longtake_frames_per_second", "Video frames a second of the last block.", by_shot)
        self._seconds = Histogram("longtake_block_seconds", "Seconds a block.", _BLOCK_SECONDS, by_film)
        self._memory = Gauge("longtake_memory_bytes", "Bytes held by a gang's rank, by name.", (*by_shot, "name"))
        self._tier = Gauge("longtake_tier_bytes", "Bytes of history's tiers.", (*by_shot, "tier"))
        self._stalled = Counter("longtake_stalled_seconds", "Waited for the disk, by who waited.", (*by_shot, "by"))
        self._copied = Counter("longtake_copied_bytes", "History between host and device.", (*by_shot, "direction"))
        self._disk = Counter(
            "longtake_disk_blocks", "Blocks of history written to or read from disk.", (*by_shot, "direction")
        )
        self._lag = Gauge("longtake_journal_lag_seconds", "From a block's commit to its journal record.", by_shot)
        self._durable = Gauge("longtake_durable_blocks", "Blocks that a restart would find.", by_shot)
        self._key: tuple[str, str] | None = None
        self._last: dict[str, float] = {}

    def __call__(self, film: str, shot: str, folder: Path, block: BlockProgress) -> None:
        """A block is done, or (with ``seconds_block`` 0) a shot goes on."""
        tags = {"film": film, "shot": shot}
        if self._key != (film, shot):
            self._key, self._last = (film, shot), {}
        if not block.seconds_block:
            self._last["frames"] = block.frames_done
            return
        self._blocks.inc(1, tags)
        self._seconds.observe(block.seconds_block, {"film": film})
        frames = self._new("frames", block.frames_done)
        if frames > 0:
            self._frames.inc(frames, tags)
        self._fps.set(frames / block.seconds_block, tags)
        self._show(last_record(folder), tags)

    def _show(self, record: Mapping[str, Any], tags: dict[str, str]) -> None:
        memory: dict[str, int] = record.get("memory", {})
        for name, size in memory.items():
            self._memory.set(size, {**tags, "name": name})
        for tier in _TIERS:
            self._tier.set(tier_bytes(memory, tier), {**tags, "tier": tier})
        for counter, tag, keys in (
            (self._stalled, "by", _STALLS),
            (self._copied, "direction", _COPIES),
            (self._disk, "direction", _BLOCKS_MOVED),
        ):
            for value, key in keys.items():
                if (more := self._new(key, record.get(key, 0))) > 0:
                    counter.inc(more, {**tags, tag: value})
        self._lag.set(record.get("last_lag_s", 0.0), tags)
        self._durable.set(record.get("durable_blocks", 0), tags)

    def _new(self, key: str, value: float) -> float:
        """What a total of the engine has grown by since the last block."""
        grown = value - self._last.get(key, 0)
        self._last[key] = value
        return grown


class FarmMetrics:
    """What the director tells of its films."""

    def __init__(self) -> None:
        self._shots = Gauge("longtake_shots", "Shots of a film by state.", ("film", "state"))
        self._done = Gauge("longtake_film_frames_done", "Video frames done.", ("film",))
        self._total = Gauge("longtake_film_frames", "Video frames of the whole film.", ("film",))
        self._hours = Gauge("longtake_gpu_hours", "Device hours spent on a film.", ("film",))
        self._starts = Gauge("longtake_shot_starts", "How often shots were given to a gang.", ("film",))
        self._failures = Gauge("longtake_shot_failures", "Failures since the last new block.", ("film",))

    def show(self, view: FilmView) -> None:
        """A film has changed."""
        tags, states = {"film": view.film.title}, Count(task.state for task in view.shots)
        for state in State:
            self._shots.set(states[state], {**tags, "state": str(state)})
        self._done.set(sum(task.frames_done for task in view.shots), tags)
        self._total.set(sum(task.num_frames for task in view.shots), tags)
        self._hours.set(sum(task.gpu_s for task in view.tasks) / 3600, tags)
        self._starts.set(sum(task.num_starts for task in view.shots), tags)
        self._failures.set(sum(task.num_failures for task in view.shots), tags)


def last_record(folder: Path) -> dict[str, Any]:
    """The last whole line of a shot's metrics.jsonl; empty where there is none."""
    try:
        with open(folder / METRICS_NAME, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return {}
    for line in reversed(lines):
        if line.endswith(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:
                return {}
            return record if isinstance(record, dict) else {}
    return {}


def tier_bytes(memory: Mapping[str, int], tier: str) -> int:
    """Bytes of a tier: all names that begin with it."""
    return sum(size for name, size in memory.items() if name.startswith(tier))
