"""The table of methods, and the benchmark that compares them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longtake.engine import bench_methods, methods_plots
from longtake.engine.bench_memory import FIRST_SEED
from longtake.engine.bench_methods import chosen, main
from longtake.engine.config import HistoryPolicy
from longtake.engine.forms import FormPolicy
from longtake.engine.methods import methods
from longtake.engine.methods_stage import Part, Task
from longtake.engine.weights import read_spec
from longtake.kernels.codec import BlockGeometry, codec_names
from longtake.kernels.errors import ConfigError, WorkerError
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
    assert [method.name for method in chosen("TC2,codecs")][:3] == ["BF16", "TC2", "INT8"]
    assert [method.name for method in chosen(None)] == list(methods())
    with pytest.raises(ConfigError, match="'LT3' is no method and no group"):
        chosen("LT3")


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_short_map(tmp_path: Path, processes: str) -> None:
    path = tmp_path / "methods.json"
    arguments = ["--json", str(path), "--seconds", "1", "--seeds", "1", "--device", "cpu", "--processes", processes]
    assert main([*arguments, "--methods", "RTN_INT2"]) == 0
    results = json.loads(path.read_text())["results"]
    dense, coarse = results["BF16"], results["RTN_INT2"]
    assert dense["ratio"] == 1 and dense["film"]["at"]["1"]["ssim"] == pytest.approx(1)
    assert dense["past"]["1"]["bf16_psnr_db"] == pytest.approx(78.13, abs=0.01), "against itself"
    assert coarse["ratio"] == pytest.approx(16 / 2.5) == coarse["minute_ratio"]
    assert coarse["encoded_bits"] == coarse["bits"] == 2.5
    assert coarse["film"]["at"]["1"]["psnr_db"] < 60 and coarse["past"]["1"]["bf16_psnr_db"] < 60
    assert 10 < coarse["past"]["1"]["world_psnr_db"] < 40
    assert coarse["past"]["1"]["world_psnr_db_by_world"] == [coarse["past"]["1"]["world_psnr_db"]]
    assert coarse["peak_bytes"] == sum(coarse["memory_bytes"].values())
    assert coarse["block_s"]["samples"] == dense["block_s"]["samples"] == 4
    before = path.read_bytes()
    assert main([*arguments, "--methods", "BF16,RTN_INT2"]) == 0  # nothing is left to do
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="holds figures of other settings"):
        main(["--json", str(path), "--seconds", "2", "--device", "cpu"])


class FakeStage:
    """Figures without a model: in the world of seed ``s`` a method is worth ``s`` - the first seed, in dB."""

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.done: list[Task] = []

    def __call__(self, task: Task) -> dict[str, Any]:
        self.done.append(task)
        if task.method in self.broken:
            raise RuntimeError("no such kernel")
        if task.part is Part.BLOCKS:
            return {"block_s": [0.5, 0.25, 0.25, 0.25]}
        value = float(task.seed - FIRST_SEED)
        kept = 100 if task.method == "BF16" else 25
        film = {
            "encoded_bits": 4.0,
            "memory_bytes": {"weights": 1, "device_arena": kept - 1, "device_slot_tables": 1},
            "peak_bytes": 1000 + task.seed - FIRST_SEED,
            "minute_bytes": 2 * kept,
            "film": {"psnr_db": [value, value + 10, value + 20], "ssim": [0.5, 0.5, 0.5]},
        }
        of_moment = {"world_psnr_db": value, "bf16_psnr_db": value, "world_ssim": 0.5, "bf16_ssim": 0.5}
        past: dict[str, Any] = {"past": {"2": of_moment}}
        return {Part.FILM: film, Part.PAST: past, Part.REFERENCE: film | past}[task.part]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> FakeStage:
    fake = FakeStage()

    class FakeConfig:
        num_devices = 1

        def __init__(self, **config: object) -> None: ...

        def __call__(self, index: int) -> FakeStage:
            return fake

    monkeypatch.setattr(bench_methods, "StageConfig", FakeConfig)
    return fake


def test_a_row_is_the_mean_over_worlds(tmp_path: Path, stage: FakeStage) -> None:
    path = tmp_path / "methods.json"
    assert main(["--json", str(path), "--methods", "INT8", "--seconds", "3", "--seeds", "4", "--device", "cpu"]) == 0
    row = json.loads(path.read_text())["results"]["INT8"]
    assert (row["ratio"], row["bits"], row["minute_ratio"], row["history_bytes"]) == (4, 4, 4, 25)
    assert row["peak_bytes"] == 1003
    assert row["film"]["at"] == {"2": {"psnr_db": 11.5, "ssim": 0.5}}
    assert row["film"]["by_second"]["psnr_db"] == [1.5, 11.5, 21.5]
    assert row["past"]["2"]["world_psnr_db"] == 1.5
    assert row["past"]["2"]["world_psnr_db_by_world"] == [0, 1, 2, 3]
    assert row["block_s"]["median"] == 0.25
    assert [(task.method, task.seed - FIRST_SEED, task.part) for task in stage.done] == [
        *(("BF16", world, Part.REFERENCE) for world in range(4)),
        *(("INT8", world, part) for world in range(4) for part in (Part.FILM, Part.PAST)),
        ("BF16", 0, Part.BLOCKS),
        ("INT8", 0, Part.BLOCKS),
    ]


def test_a_method_that_fails_leaves_the_others_and_is_tried_again(tmp_path: Path, stage: FakeStage) -> None:
    path = tmp_path / "methods.json"
    stage.broken.add("TC2")
    arguments = ["--json", str(path), "--methods", "TC2,INT8", "--device", "cpu", "--seeds", "1", "--seconds", "3"]
    assert main(arguments) == 1
    written = json.loads(path.read_text())
    assert set(written["results"]) == {"BF16", "INT8"}
    assert written["config"]["failed"] == {"TC2": "RuntimeError: no such kernel"}
    assert sum(task.method == "TC2" for task in stage.done) == 1, "nothing more of it is tried"
    stage.broken.clear()
    stage.done.clear()
    assert main([*arguments, "--processes", "1"]) == 0
    assert [(task.method, task.part) for task in stage.done] == [
        ("BF16", Part.REFERENCE),
        ("TC2", Part.FILM),
        ("TC2", Part.PAST),
        ("TC2", Part.BLOCKS),
    ]
    written = json.loads(path.read_text())
    assert list(written["results"]) == ["BF16", "INT8", "TC2"] and written["config"]["failed"] == {}


def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path: Path, stage: FakeStage) -> None:
    path = tmp_path / "methods.json"
    arguments = ["--json", str(path), "--methods", "INT8,TC2", "--device", "cpu", "--seeds", "2", "--seconds", "3"]
    found = stage.__call__

    def cut_off(task: Task) -> dict[str, Any]:
        if task.method == "TC2" and task.seed > FIRST_SEED:
            raise KeyboardInterrupt
        return found(task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeStage, "__call__", lambda self, task: cut_off(task))
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    assert set(json.loads(path.read_text())["results"]) == {"BF16", "INT8"}, "what is whole is there"
    assert main(arguments) == 0
    assert all("block_s" in row for row in json.loads(path.read_text())["results"].values())


def test_without_the_reference_there_is_no_map(tmp_path: Path, stage: FakeStage) -> None:
    stage.broken.add("BF16")
    with pytest.raises(WorkerError, match="BF16: RuntimeError: no such kernel"):
        main(["--json", str(tmp_path / "methods.json"), "--methods", "INT8", "--device", "cpu"])


def test_a_loss_is_the_median_of_worlds_and_the_front_has_no_better_with_fewer_bits() -> None:
    dense, own = (
        {"past": {"2": {"world_psnr_db_by_world": worlds}}} for worlds in ([32.0, 24.0, 33.0], [31.0, 29.0, 30.0])
    )
    assert methods_plots.lost_db(own, dense, "2") == 1.0
    points = {"fewest": (1.0, 20.0), "worse": (2.0, 19.0), "better": (2.0, 25.0), "most": (9.0, 24.0)}
    assert methods_plots.front(points) == ["fewest", "better"]


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
        "past": {"2": {"bf16_psnr_db": 40.0, "world_psnr_db_by_world": [25.0]}},
    }
    results = {"BF16": {**row, "group": "study"}, "TC2": {**row, "group": "codecs"}, "A": {**row, "group": "policies"}}
    paths = methods_plots.draw(results, tmp_path / "plots")
    assert [path.name for path in paths] == [
        "methods_quality_over_bits.png",
        "methods_quality_over_time.png",
        "methods_peak_over_ratio.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
