"""What a gang exports, as far as it needs no Ray that runs: a shot goes on whatever becomes of its figures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from longtake.engine.shot import BlockProgress
from longtake.jobs.blockrecord import METRICS_NAME
from longtake.jobs.metrics import GangMetrics


def block(number: int) -> BlockProgress:
    return BlockProgress(
        block=number, num_blocks=9, frames_done=12 * number, num_frames=108, seconds_block=0.5, device_cache_bytes=1
    )


def test_a_network_disk_that_is_away_for_a_moment_fails_no_shot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = {"host": {"used_bytes": 10, "budget_bytes": 20}, "disk": {"used_bytes": 10, "budget_bytes": None}}
    line = {"time": 1.0, "block": 1, "seconds": 0.5, "frames": 12, "tiers": tiers, "up_bytes": 7}
    (tmp_path / METRICS_NAME).write_text(json.dumps(line) + "\n")
    told: list[tuple[str, Any]] = []
    metrics = GangMetrics()
    monkeypatch.setattr(metrics._budget, "set", lambda value, tags: told.append((tags["tier"], value)))
    monkeypatch.setattr(metrics._copied, "inc", lambda value, tags: told.append((tags["direction"], value)))

    def statvfs(path: object) -> None:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as away:
        away.setattr(os, "statvfs", statvfs)
        metrics("Harbour", "arrival", tmp_path, block(1))
    assert told == [("host", 20), ("up", 7)], "what there is no room to know of is left out, the rest is told"
    metrics("Harbour", "arrival", tmp_path, block(2))
    assert [tier for tier, _ in told[2:]] == ["host", "disk"]
