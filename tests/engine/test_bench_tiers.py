"""``longtake bench tiers`` on a CPU: every part runs and says what it is meant to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longtake.engine import bench_tiers
from longtake.engine.bench_tiers import TiersBench, run_tiers
from longtake.engine.tiers_disk import _Bench
from longtake.engine.tiers_resume import _make_run
from longtake.jobs import cli
from longtake.kernels.codec import BlockGeometry, make_codec
from longtake.kernels.errors import CapacityError
from longtake.offload.chunkfiles import DiskIO
from longtake.offload.run import RunDirectory
from longtake.offload.shape import ModelKVShape

SMALL = TiersBench(
    geometry="small", device="cpu", window_blocks=8, blocks=2, ways=(DiskIO.SYSTEM,), disk_blocks=3, passes=2, minutes=1
)


@pytest.fixture(autouse=True)
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = make_codec("int4", BlockGeometry(num_tokens=64, head_dim=64))
    shape = ModelKVShape(num_layers=3, num_heads=2, codec=codec)
    monkeypatch.setattr(bench_tiers, "disk_shape", lambda codec: shape)


def test_every_part(tmp_path: Path) -> None:
    failed: dict[str, str] = {}
    found = run_tiers(SMALL, tmp_path, failed)
    assert failed == {}
    streaming, shape = found["streaming"], bench_tiers.Stage(SMALL).shape
    passes = 5  # four steps and the commit
    assert streaming["attended_bytes"] == 8 * shape.block_bytes
    assert streaming["resident"]["up_bytes_a_block"] == 0
    assert streaming["resident"]["memory_bytes"]["device_arena"] == 9 * shape.block_bytes
    assert streaming["host"]["memory_bytes"]["device_arena"] == 3 * shape.block_bytes
    moved = streaming["host"]["up_bytes_a_block"]
    assert 6 * passes * shape.block_bytes <= moved <= (8 * passes + 4) * shape.block_bytes
    for name in ("system",):
        disk = found["disk"][name]
        assert disk["used"] == name and all(
            disk[figure]["median"] > 0
            for figure in ("write_MB_s", "read_MB_s", "spill_MB_s", "prefetch_MB_s", "spill_to_own_write_speed")
        )
        assert disk["spill_cpu_s_per_GB"]["samples"] == 2
        assert disk["steady_spill_MB_s"]["p10"] > 0 and disk["steady_prefetch_to_own_read_speed"]["p10"] > 0
    persistence, resume = found["persistence"], found["resume"]
    assert persistence["lag_s"]["median"] > 0 and persistence["with_to_without"]["samples"] == 2
    assert resume["run_blocks"] == 80 and resume["history_read_bytes"] == 8 * shape.block_bytes
    assert resume["journal_s"]["samples"] == 3
    assert 0 < resume["journal_s"]["median"] < resume["first_block_s"]["median"]
    assert not [path for path in tmp_path.iterdir() if path.name not in ("kept", "resumed")]
    kept = next((tmp_path / "resumed" / "kv.zarr").rglob("c.79.*"))
    assert kept.stat().st_nlink == 1, "the copies that were gone on with are gone"


def test_a_case_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*arguments: object, **names: object) -> None:
        raise CapacityError("the system refuses to pin")

    monkeypatch.setattr("longtake.offload.cache.HostPool", no_room)
    bench = replace(SMALL, parts=("streaming", "disk", "resume"))
    failed: dict[str, str] = {}
    saved: list[set[str]] = []
    found = run_tiers(bench, tmp_path, failed, lambda results: saved.append(set(results)))
    assert set(failed) == {"streaming, quarter", "streaming, host", "disk, system", "resume"}
    assert found["streaming"]["resident"]["to_resident"]["median"] == 1
    assert saved == [{"streaming"}, {"streaming", "disk"}, {"streaming", "disk"}]


def test_the_disk_and_the_cache_take_turns_in_going_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[str] = []

    def noted(part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def begin(bench: object, folder: Path) -> Any:
            assert not folder.exists(), "what was there before would be in the page cache"
            began.append(part)
            return run(bench, folder)

        return begin

    for part in ("_own", "_cache"):
        monkeypatch.setattr(_Bench, part, noted(part, getattr(_Bench, part)))
    run_tiers(replace(SMALL, parts=("disk",)), tmp_path, {})
    assert began == ["_cache", "_own", "_own", "_cache", "_cache", "_own"] and not list(tmp_path.iterdir())


def test_what_is_resumed_has_a_file_of_its_own_for_every_needed_chunk(tmp_path: Path) -> None:
    stage = bench_tiers.Stage(SMALL)
    _make_run(stage, tmp_path / "made", 20, needed := (0, 18, 19))
    run = RunDirectory(tmp_path / "made", shape=stage.shape, config_hash="bench")
    try:
        assert run.num_blocks == 20 and run.num_kept == 3
        page_HP = np.zeros((stage.shape.num_heads, stage.shape.payload_bytes(0)), dtype=np.uint8)
        for block, layer in product(needed, range(stage.shape.num_layers)):
            run.store.read_page(block, layer, page_HP, run.checksums_RH(block))
        files = {run.store.path(block, chunk).stat().st_ino for block in needed for chunk in run.store.chunks}
        assert len(files) == len(needed) * len(run.store.chunks)
    finally:
        run.close()


def test_one_block_is_no_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_tiers.main(["--json", str(tmp_path / "tiers.json"), "--parts", "disk", "--disk-blocks", "1"])
    assert "two blocks or more" in capsys.readouterr().err


def test_command_line(tmp_path: Path) -> None:
    arguments = ["bench", "tiers", "--json", str(tmp_path / "tiers.json"), "--parts", "disk", "--disk-io", "system"]
    arguments += ["--work", str(tmp_path), "--disk-blocks", "2", "--passes", "1", "--device", "cpu"]
    assert cli.run(arguments) == 0
    written = json.loads((tmp_path / "tiers.json").read_text())
    assert "fsynced" in written["config"]["protocol"] and written["results"]["disk"]["num_blocks"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["tiers.json"]
