"""What is read from a shot's metrics.jsonl; what is exported is tested with Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ray")

from longtake.jobs.metrics import last_record, tier_bytes


def test_the_last_whole_line(tmp_path: Path) -> None:
    assert last_record(tmp_path) == {}
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"block": 1}\n{"block": 2}\n{"blo')
    assert last_record(tmp_path) == {"block": 2}
    path.write_text("x" * 200_000 + '\n{"block": 3}\n')
    assert last_record(tmp_path) == {"block": 3}
    for text in ("", "[1]\n", "nonsense\n"):
        path.write_text(text)
        assert last_record(tmp_path) == {}


def test_tiers_are_names_beginning_with_them() -> None:
    memory = {"weights": 5, "device_arena": 3, "device_slot_tables": 1, "host_pool": 8}
    assert (tier_bytes(memory, "device"), tier_bytes(memory, "host")) == (4, 8)
