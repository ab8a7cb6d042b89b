from __future__ import annotations

import json
from pathlib import Path

import pytest

from longtake.kernels import bench

SMALL = "--device cpu --height 3 --width 5 --heads 2 --dim 64 --repeats 2 --blocks 2,3 --chunk 2 --codecs bf16,int4"


def test_report_holds_every_case_and_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out" / "kernels.json"
    monkeypatch.setattr("sys.argv", ["bench", "--json", str(target), *SMALL.split()])
    assert bench.main() == 0
    report = json.loads(target.read_text())
    assert {"torch", "triton", "device", "commit"} <= set(report["setting"])
    assert [(r["kind"], r["blocks"]) for r in report["results"]] == [
        (kind, blocks) for kind in ("noise", "structured") for blocks in (2, 3)
    ]
    for result in report["results"]:
        exact, int4 = result["codecs"]["bf16"], result["codecs"]["int4"]
        assert exact["bits_per_element"] == 16 and exact["output_relative_error"] < 0.01
        # a section's pad to 16 bytes shows at 45 tokens
        assert 4.5 <= int4["bits_per_element"] < 4.55 and int4["output_relative_error"] < 0.5
        fp8 = int4["paths"]["fp8"]
        assert fp8["output_relative_error"] < 0.5 and fp8["ratio_to_dense"] > 0 and abs(fp8["error_growth"]) < 0.5
        assert set(int4["paths"]) == {"fp8", "fp8-bf16v"}
        assert int4["materialise"]["p10_ms"] <= int4["materialise"]["median_ms"] <= int4["materialise"]["p90_ms"]
