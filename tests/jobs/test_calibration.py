"""Time from a benchmark: the benchmark's own shot takes what it took, and other sizes what their work says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longtake.engine.bench_rollout import RolloutBench, make_shot
from longtake.engine.config import HistoryPolicy
from longtake.jobs import cli
from longtake.jobs.calibration import SHIPPED, choose, film_seconds, read_calibrations, shot_seconds
from longtake.kernels.errors import ConfigError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_what_is_shipped_is_what_was_measured() -> None:
    for path in SHIPPED.glob("*.json"):
        assert path.read_bytes() == (RESULTS / path.name).read_bytes()


def test_the_benchmarks_own_shot() -> None:
    runs = json.loads((SHIPPED / "rollout_h200.json").read_text())["results"]
    known = read_calibrations(SHIPPED / "rollout_h200.json")
    decoding = runs[0]["result"]["vae"]["seconds_a_block"]["median"]
    for run in runs:
        codec, attention, weights = (run["config"][key] for key in ("codec", "attention", "weights"))
        calibration = choose(known, codec, attention)
        assert "H200" in calibration.source
        shot = make_shot(RolloutBench(codec=codec, attention=attention, weights=weights))
        block = run["result"]["seconds_a_block"]["median"] + decoding
        assert shot_seconds(shot, calibration) == pytest.approx(shot.num_blocks * block, rel=0.02)


def test_the_way_of_attending_counts_more_than_the_codec() -> None:
    known = read_calibrations(SHIPPED / "rollout_h200.json")
    ways = [(one.codec, one.attention) for one in known]
    assert ways == [("int4", "fp8"), ("tc2", "fp8"), ("bf16", "dense")]
    chosen = [choose(known, *way) for way in (("tc2", "fp8"), ("int4", "dense"), ("qvg", "fp8"), ("qvg", "none"))]
    assert [known.index(one) for one in chosen] == [1, 2, 0, 0]


def test_more_work_takes_longer() -> None:
    (calibration, *_) = read_calibrations(SHIPPED / "rollout_h200.json")
    shot = dataclasses.replace(make_shot(RolloutBench()), num_frames=16 * 60)
    base = shot_seconds(shot, calibration)
    full = dataclasses.replace(shot, history=dataclasses.replace(shot.history, policy=HistoryPolicy.FULL))
    assert shot_seconds(full, calibration) > 3 * base
    wide = dataclasses.replace(shot, height=960, width=1664)
    assert shot_seconds(wide, calibration) > 4 * base
    assert shot_seconds(shot, calibration, decoder_weights=0) < base


def test_shots_on_gangs_wait_for_each_other() -> None:
    shots = [("a", None, 10.0), ("b", "a", 5.0), ("c", None, 4.0), ("d", None, 4.0)]
    assert film_seconds(shots, 1) == 23.0
    assert film_seconds(shots, 2) == 15.0
    assert film_seconds(shots, 8) == 15.0
    assert film_seconds([], 1) == 0.0


@pytest.mark.parametrize("text", ["", "[]", '{"benchmark": "tiers"}', '{"benchmark": "rollout", "results": [{}]}'])
def test_what_is_no_calibration(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"longtake bench rollout --json"):
        read_calibrations(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_calibrations(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(benchmark="film"), "this is bench film with 3 results; longtake bench"),
        (lambda data: data.update(results=[]), "this is bench rollout with 0 results; longtake bench"),
        (lambda data: data.pop("environment"), "no file of longtake bench rollout"),
        (lambda data: data["results"][0]["result"]["stages_s"].update(block=0), "no file of longtake bench rollout"),
        (lambda data: data["results"][0]["result"]["seconds_a_block"].update(median=-1), "a block took -"),
        (lambda data: data["results"][0]["result"]["seconds_a_block"].update(median=float("nan")), "a block took nan"),
        (lambda data: data["results"][0]["config"].update(geometry="9b"), "no file of longtake bench rollout"),
    ],
)
def test_a_file_of_another_benchmark_or_version(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    data = json.loads((SHIPPED / "rollout_h200.json").read_text())
    change(data)
    path = tmp_path / "c.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError) as caught:
        read_calibrations(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert str(caught.value).count(str(path)) == 1, "it is said once"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = tmp_path / "film.toml"
    film.write_text('[film]\nmodel = "mini"\n[[shot]]\nname = "a"\nduration = "1m"\nprompt = "p"\n')
    assert cli.run(["plan", str(film), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "from the rollout benchmark on" in said
    assert cli.run(["plan", str(film), "--device", "cpu", "--gpus", "2", "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    (shot,) = data["shots"]
    assert data["seconds"] == shot["seconds"] > 1
    assert shot["vae_bytes"] > 0 and shot["disk_bytes"] > shot["history_bytes"]
    assert data["host_bytes"] == 2 * shot["host_bytes"] > 0
    assert cli.run(["plan", str(film), "--gpus", "0"]) == 2
