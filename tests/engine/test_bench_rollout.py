"""The rollout benchmark keeps the figures it has, whatever fails after them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longtake.engine import bench_rollout
from longtake.engine.bench_rollout import RolloutBench


def test_a_case_that_fails_costs_no_other_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(bench: RolloutBench, failed: dict[str, str]) -> dict[str, Any]:
        if bench.attention == "fp8":
            raise RuntimeError("no such kernel")
        return {"seconds_a_block": {"median": 0.5}, "stages_s": {}}

    monkeypatch.setattr(bench_rollout, "run_rollout", run)
    target = tmp_path / "rollout.json"
    assert bench_rollout.main(["--json", str(target), "--cases", "bf16,int4/fp8,tc2"]) == 1
    written = json.loads(target.read_text())
    assert [one["config"]["codec"] for one in written["results"]] == ["bf16", "tc2"]
    assert written["config"]["failed"] == {"int4/fp8": "RuntimeError: no such kernel"}
    assert "no such kernel" in capsys.readouterr().err


def test_a_vae_that_fails_costs_the_rollout_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> dict[str, Any]:
        raise RuntimeError("no such layer")

    monkeypatch.setattr(bench_rollout, "_vae", broken)
    target = tmp_path / "rollout.json"
    options = ["--geometry", "tiny", "--size", "32x48", "--window", "2", "--blocks", "1", "--device", "cpu"]
    assert bench_rollout.main(["--json", str(target), "--cases", "int4", *options]) == 1
    written = json.loads(target.read_text())
    assert written["config"]["failed"] == {"vae": "RuntimeError: no such layer"}
    assert written["results"][0]["result"]["seconds_a_block"]["median"] > 0
