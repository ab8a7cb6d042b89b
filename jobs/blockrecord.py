"""A line of a shot's metrics.jsonl, as the engine writes it after every block; read for status, metrics and reports."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"
TIERS = ("device", "host", "disk")
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TierUse:
    """Bytes of a shot's history in one tier, all ranks together; ``budget_bytes`` None: all that there is room for."""

    used_bytes: int
    budget_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRecord:
    """One block. Totals are since the shot was last begun, and of rank 0, which every rank of a gang equals.

    Args:
        time_s: when it was done, seconds since 1970.
        block: its number, from 1 on; ``seconds`` it took, ``frames`` decoded until then.
        num_ranks: of the gang.
        stages_s: total seconds by stage.
        memory: bytes by name.
        tiers: by name.
        totals: the cache's counters by name, such as ``up_bytes``.
    """

    time_s: float
    block: int
    seconds: float
    frames: int
    num_ranks: int = 1
    stages_s: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    tiers: Mapping[str, TierUse] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)

    def total(self, name: str) -> float:
        """A counter of the cache; 0 where an older version did not write it."""
        return self.totals.get(name, 0.0)

    @property
    def stalled_s(self) -> float:
        """Seconds waited for the disk."""
        return self.total("stalled_host_s") + self.total("stalled_disk_s")


def parse_record(line: bytes) -> BlockRecord | None:
    """A line's record; None for a torn line or one that is none."""
    try:
        data = json.loads(line, parse_constant=_no_number) if line.endswith(b"\n") else None
        return None if data is None else _record(data)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no figure")


def _record(data: dict[str, Any]) -> BlockRecord:
    num_ranks = int(data.get("num_ranks", 1))
    known = {"time", "block", "seconds", "frames", "num_ranks", "stages_s", "memory", "tiers"}
    return BlockRecord(
        time_s=float(data["time"]),
        block=int(data["block"]),
        seconds=float(data["seconds"]),
        frames=int(data["frames"]),
        num_ranks=num_ranks,
        stages_s={str(name): float(seconds) for name, seconds in data.get("stages_s", {}).items()},
        memory={str(name): int(size) for name, size in data.get("memory", {}).items()},
        tiers={str(name): _tier(tier, num_ranks) for name, tier in data.get("tiers", {}).items()},
        totals={
            name: float(value)
            for name, value in data.items()
            if name not in known and isinstance(value, int | float)  # others are for people
        },
    )


def _tier(data: dict[str, Any], num_ranks: int) -> TierUse:
    budget = data["budget_bytes"]
    return TierUse(
        used_bytes=int(data["used_bytes"]) * num_ranks, budget_bytes=None if budget is None else int(budget) * num_ranks
    )


def read_records(folder: Path) -> Iterator[BlockRecord]:
    """All records of a shot's folder, in order; none where there is no file that can be read."""
    with suppress(OSError), open(folder / METRICS_NAME, "rb") as file:
        for line in file:
            if (record := parse_record(line)) is not None:
                yield record


def last_record(folder: Path) -> BlockRecord | None:
    """The last whole line's record; None where there is none."""
    try:
        with open(folder / METRICS_NAME, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return None
    return next((parse_record(line) for line in reversed(lines) if line.endswith(b"\n")), None)
