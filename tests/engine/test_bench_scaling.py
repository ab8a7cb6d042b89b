"""The scaling benchmark writes what it has after every case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longtake.engine import bench_scaling
from longtake.engine.bench_scaling import ScalingCase


def test_figures_are_there_when_a_later_case_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(case: ScalingCase, *rest: Any) -> dict[str, Any]:
        if case.kv_tokens > 400:
            raise RuntimeError("out of memory")
        return {"seconds_a_block": {"median": 0.5}, "kv_tokens": case.kv_tokens}

    monkeypatch.setattr(bench_scaling, "run_case", run)
    target = tmp_path / "scaling.json"
    options = ["--geometries", "tiny", "--size", "32x48", "--device", "cpu"]
    with pytest.raises(RuntimeError, match="out of memory"):
        bench_scaling.main(["--json", str(target), "--kv", "400,800", *options])
    written = json.loads(target.read_text())["results"]
    assert [case["config"]["kv_tokens"] for case in written["cases"]] == [400]
    bench_scaling.main(["--json", str(target), "--kv", "400,400", "--budget", "-1", *options])
    written = json.loads(target.read_text())["results"]
    assert written["cases"] == [] and len(written["skipped"]) == 2


@pytest.mark.parametrize("codec", ["int4", "pc2"])
def test_random_weights_have_what_a_codec_needs(codec: str, tmp_path: Path) -> None:
    target = tmp_path / "scaling.json"
    options = ["--geometries", "tiny", "--size", "32x48", "--device", "cpu", "--attention", "dense", "--blocks", "1"]
    bench_scaling.main(["--json", str(target), "--kv", "100", "--codec", codec, *options])
    (case,) = json.loads(target.read_text())["results"]["cases"]
    assert case["result"]["seconds_a_block"]["median"] > 0
