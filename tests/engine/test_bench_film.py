"""``longtake bench film`` on a CPU: figures part by part, and a decoder that fails leaves the rollout's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longtake.engine import bench_film
from longtake.engine.bench_film import main

ARGUMENTS = ["--geometry", "tiny", "--device", "cpu", "--size", "32x48", "--kv", "36", "--codec", "bf16"]
ARGUMENTS += ["--attention", "dense", "--blocks", "1", "--rounds", "1", "--plain-vae"]


def test_every_part(tmp_path: Path) -> None:
    assert main([*ARGUMENTS, "--json", str(tmp_path / "film.json")]) == 0
    written = json.loads((tmp_path / "film.json").read_text())
    found = written["results"][0]["result"]
    assert written["config"]["failed"] == {} and found["memory_bytes"]["weights"] > 0
    assert found["seconds_a_block"]["median"] > 0 and found["seconds_a_block_without_decoding"]["median"] > 0
    assert found["frames_a_second"]["median"] == pytest.approx(12 / found["seconds_a_block"]["median"])
    assert found["seconds_of_decoding_alone"]["samples"] == 3 and found["decoder_state_bytes"] > 0


def test_a_decoder_that_fails_leaves_the_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **names: Any) -> None:
        raise RuntimeError("no such layer")

    monkeypatch.setattr(bench_film, "make_decoder", fail)
    assert main([*ARGUMENTS, "--json", str(tmp_path / "film.json")]) == 1
    written = json.loads((tmp_path / "film.json").read_text())
    assert written["config"]["failed"] == {"decoding": "RuntimeError: no such layer"}
    assert set(written["results"][0]["result"]) == {"memory_bytes", "seconds_a_block_without_decoding"}
