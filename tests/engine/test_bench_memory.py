"""``longtake bench memory`` without a model: figures part by part, and a part that fails leaves the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longtake.engine import bench_memory
from longtake.engine.bench_memory import main


def test_a_part_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memory.json"

    def visit(models: Any, seed: int, pan_px: int, cases: Any, blocks: int) -> dict[str, float]:
        if pan_px == 3:
            raise RuntimeError("out of memory")
        return {case.name: float(pan_px) for case in cases}

    def brought_back(*arguments: Any) -> dict[str, float]:
        assert "8.0 s" in json.loads(path.read_text())["results"]["return_visit_psnr_db"], "written part by part"
        return {"right": 1.0}

    monkeypatch.setattr(bench_memory, "load", lambda name, device: None)
    monkeypatch.setattr(bench_memory, "return_visit", visit)
    monkeypatch.setattr(bench_memory, "retrieval", brought_back)
    arguments = ["--json", str(path), "--worlds", "1", "--film-seconds", "0", "--cases", "full;window 4"]
    assert main([*arguments, "--speeds", "4,3,2"]) == 1
    written = json.loads(path.read_text())
    assert written["config"]["failed"] == {"return visits, 10.7 s": "RuntimeError: out of memory"}
    assert set(written["results"]["return_visit_psnr_db"]["8.0 s"]) == {"full", "window 4"}
    assert written["results"]["brought_back"] == {"pan": [{"right": 1.0}], "pan that turns round": [{"right": 1.0}]}
    assert main([*arguments, "--speeds", "4"]) == 0
