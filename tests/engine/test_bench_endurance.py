"""``longtake bench endurance`` on a few seconds of film."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longtake.engine.bench_endurance import main, trend


def test_a_short_shot(tmp_path: Path) -> None:
    main(["--json", str(tmp_path / "endurance.json"), "--minutes", "0.25", "--host-part", "0.3"])
    record = json.loads((tmp_path / "endurance.json").read_text())
    assert record["config"]["minutes"] == 0.25
    results = record["results"]
    assert results["blocks"] == 21
    assert results["host_budget_bytes"] == int(0.3 * results["history_bytes"])
    # counted when the last block is committed: as many as the host tier holds may still be on their way to the disk
    assert 21 - 0.3 * 21 <= results["cache"]["num_written"] <= 21
    assert len(results["rss_bytes"]["medians_by_tenth"]) == 10


def test_trends() -> None:
    flat = trend([5.0] * 100)
    assert flat["growth_over_the_shot"] == pytest.approx(0)
    rising = trend([100.0 + block for block in range(100)])
    assert rising["slope_a_block"] == pytest.approx(1)
    assert rising["growth_over_the_shot"] == pytest.approx(100 / 154.5)
