"""The table of methods, and the benchmark that compares them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from longtake.engine import bench_methods, methods_plots
from longtake.engine.bench_methods import chosen, main
from longtake.engine.config import HistoryPolicy
from longtake.engine.forms import FormPolicy
from longtake.engine.methods import Method, methods
from longtake.engine.weights import read_spec
from longtake.kernels.codec import BlockGeometry, codec_names
from longtake.kernels.errors import ConfigError
from longtake.kernels.forms import make_form


def test_the_study_has_33_methods_and_each_can_be_kept() -> None:
    spec, known = read_spec("mini"), methods()
    assert sum(method.group == "study" for method in known.values()) == 33
    assert spec.history.policy is HistoryPolicy.WINDOW
    geometry = BlockGeometry(num_tokens=180, head_dim=spec.transformer.head_dim, grid=(6, 10))
    used = set()
    for method in known.values():
        history = replace(spec.history, prune=method.prune)
        for form in FormPolicy(history, method.cache).specs:
            make_form(form.codec, geometry, form.window)
            used.add(form.codec)
        assert method.line.startswith("{ codec =") and method.line.endswith(" }")
    assert set(codec_names()) - used == {"fp32", "int4"}, "a codec that no method measures; int4 is rtn4"
    settings = {(method.cache, method.prune, method.attention) for method in known.values()}
    assert len(settings) == len(known), "two methods are the same"


def test_choice_of_methods() -> None:
    assert [method.name for method in chosen("LT2,codecs")][:2] == ["LT2", "INT8"]
    assert len(chosen(None)) == len(methods())
    with pytest.raises(ConfigError, match="'LT3' is no method and no group"):
        chosen("LT3")


@pytest.mark.slow
def test_a_short_map(tmp_path: Path) -> None:
    path = tmp_path / "methods.json"
    arguments = ["--json", str(path), "--seconds", "1", "--seeds", "1", "--device", "cpu"]
    main([*arguments, "--methods", "BF16,RTN_INT2"])
    results = json.loads(path.read_text())["results"]
    dense, coarse = results["BF16"], results["RTN_INT2"]
    assert dense["ratio"] == 1 and dense["film"]["at"]["1"]["ssim"] == pytest.approx(1)
    assert coarse["ratio"] == pytest.approx(16 / 2.5) == coarse["minute_ratio"]
    assert coarse["encoded_bits"] == coarse["bits"] == 2.5
    assert coarse["film"]["at"]["1"]["psnr_db"] < 60 and coarse["past"]["1"]["bf16_psnr_db"] < 60
    assert 10 < coarse["past"]["1"]["world_psnr_db"] < 40
    assert coarse["peak_bytes"] == sum(coarse["memory_bytes"].values())
    before = path.read_bytes()
    main([*arguments, "--methods", "BF16,RTN_INT2"])  # nothing is left to do
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="holds figures of other settings"):
        main(["--json", str(path), "--seconds", "2", "--device", "cpu"])


def test_a_method_that_fails_leaves_the_others_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "methods.json"
    measured: list[str] = []
    broken = {"LT2"}

    def measure(stage: object, method: Method, reference: object) -> dict[str, str]:
        measured.append(method.name)
        if method.name in broken:
            raise RuntimeError("no such kernel")
        return {"group": method.group}

    monkeypatch.setattr(bench_methods, "load", lambda name, device: None)
    monkeypatch.setattr(bench_methods, "Stage", lambda models, seeds, seconds: None)
    monkeypatch.setattr(bench_methods, "render_reference", lambda stage: None)
    monkeypatch.setattr(bench_methods, "measure", measure)
    monkeypatch.setattr(bench_methods, "_line", lambda name, row: name)
    arguments = ["--json", str(path), "--methods", "BF16,LT2,INT8", "--device", "cpu"]
    assert main(arguments) == 1
    written = json.loads(path.read_text())
    assert set(written["results"]) == {"BF16", "INT8"}
    assert written["config"]["failed"] == {"LT2": "RuntimeError: no such kernel"}
    broken.clear()
    assert main(arguments) == 0
    assert measured == ["BF16", "LT2", "INT8", "LT2"]
    written = json.loads(path.read_text())
    assert set(written["results"]) == {"BF16", "INT8", "LT2"} and written["config"]["failed"] == {}


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = {
        "ratio": 4.0,
        "bits": 4.0,
        "peak_bytes": 1 << 20,
        "film": {
            "at": {"2": {"psnr_db": 30.0, "ssim": 0.9}},
            "by_second": {"psnr_db": [31.0, 30.0], "ssim": [0.9, 0.9]},
        },
        "past": {"2": {"bf16_psnr_db": 40.0, "world_psnr_db": 25.0}},
    }
    results = {"BF16": {**row, "group": "study"}, "LT2": {**row, "group": "codecs"}, "A": {**row, "group": "policies"}}
    paths = methods_plots.draw(results, tmp_path / "plots")
    assert [path.name for path in paths] == [
        "methods_quality_over_bits.png",
        "methods_quality_over_time.png",
        "methods_peak_over_ratio.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
