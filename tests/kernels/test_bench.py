from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longtake.kernels import bench, flash3
from tests.kernels.test_flash3 import plain_operator

SMALL = "--device cpu --height 3 --width 5 --heads 2 --dim 64 --repeats 2 --blocks 2,3 --chunk 2 --codecs bf16,int4,tc2"


def test_report_holds_every_case_and_the_setting(tmp_path: Path) -> None:
    target = tmp_path / "out" / "kernels.json"
    assert bench.main(["--json", str(target), *SMALL.split()]) == 0
    report = json.loads(target.read_text())
    assert {"torch", "triton", "device", "commit"} <= set(report["setting"])
    assert [(r["kind"], r["blocks"]) for r in report["results"]] == [
        (kind, blocks) for kind in ("noise", "structured") for blocks in (2, 3)
    ]
    assert report["failed"] == {}
    for result in report["results"]:
        exact, int4 = result["codecs"]["bf16"], result["codecs"]["int4"]
        assert exact["bits_per_element"] == 16 and exact["output_relative_error"] < 0.01
        # a section's pad to 16 bytes shows at 45 tokens
        assert 4.5 <= int4["bits_per_element"] < 4.55 and int4["output_relative_error"] < 0.5
        assert result["codecs"]["tc2"]["bits_per_element"] < 2.5
        fp8 = int4["paths"]["fp8"]
        assert fp8["output_relative_error"] < 0.5 and fp8["ratio_to_dense"] > 0 and abs(fp8["error_growth"]) < 0.5
        assert set(int4["paths"]) == {"fp8"}
        assert int4["materialise"]["p10_ms"] <= int4["materialise"]["median_ms"] <= int4["materialise"]["p90_ms"]


def test_what_fails_costs_no_other_case_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = bench.measure_path

    def broken(case: bench.Case, name: str, *rest: Any) -> dict[str, Any]:
        if name == "fp8":
            raise RuntimeError("no such kernel")
        return whole(case, name, *rest)

    monkeypatch.setattr(bench, "measure_path", broken)
    target = tmp_path / "kernels.json"
    options = [*SMALL.split()[:-1], "bf17,int4", "--kinds", "noise", "--blocks", "2"]
    assert bench.main(["--json", str(target), *options]) == 1
    report = json.loads(target.read_text())
    assert report["failed"].keys() == {"noise 2 bf17", "noise 2 int4 fp8"}
    assert list(report["results"][0]["codecs"]) == ["int4"]
    assert report["results"][0]["codecs"]["int4"]["paths"] == {}
    assert "no such kernel" in capsys.readouterr().err


def test_splits_are_timed_without_any_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash3, "_operator", lambda: plain_operator)
    monkeypatch.setattr(flash3, "available", lambda device, dim: True)
    target = tmp_path / "splits.json"
    options = [*SMALL.split()[:-1], "", "--kinds", "noise", "--splits"]
    assert bench.main(["--json", str(target), *options]) == 0
    for result in json.loads(target.read_text())["results"]:
        found = result["fp8_flash3_splits"]
        assert [(of["splits"], of["chosen"]) for of in found] == [(n, n == 1) for n in bench.SPLITS]
        assert all(0 < of["error"] < 0.2 and of["TFLOP_per_s"] > 0 for of in found) and result["codecs"] == {}
