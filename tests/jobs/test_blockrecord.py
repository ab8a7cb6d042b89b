"""What is read from a shot's metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longtake.jobs import cli
from longtake.jobs.blockrecord import TIERS, TierUse, last_record, read_records


def line(block: int, **values: Any) -> str:
    return json.dumps({"time": 5.0, "block": block, "seconds": 0.25, "frames": 9, **values}) + "\n"


def test_the_last_whole_line(tmp_path: Path) -> None:
    assert last_record(tmp_path) is None
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2) + '{"blo')
    assert (record := last_record(tmp_path)) is not None
    assert (record.block, record.seconds, record.frames, record.num_ranks) == (2, 0.25, 9, 1)
    path.write_text("x" * 200_000 + "\n" + line(3))
    assert (record := last_record(tmp_path)) is not None and record.block == 3
    for text in ("", "[1]\n", "nonsense\n", '{"block": 1}\n'):
        path.write_text(text)
        assert last_record(tmp_path) is None


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(line(1, disk_io="pool", up_bytes=7, note=None, more={"a": 1}))
    assert (record := last_record(tmp_path)) is not None
    assert record.totals == {"up_bytes": 7.0}


@pytest.mark.parametrize("figure", ["NaN", "1e999", '"x"', "null"])
def test_lines_without_figures_are_left_out(tmp_path: Path, figure: str) -> None:
    good = line(1)
    (tmp_path / "metrics.jsonl").write_text(f'{{"time": 1, "block": 2, "seconds": 1, "frames": {figure}}}\n' + good)
    assert [record.block for record in read_records(tmp_path)] == [1]


def test_a_file_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    assert not list(read_records(tmp_path)) and last_record(tmp_path) is None


def test_what_the_engine_writes_is_read(tiny_model: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.toml"
    film.write_text(f'[film]\nmodel = "{tiny_model}"\n[[shot]]\nname = "a"\nduration = "3s"\nprompt = "p"\n')
    assert cli.run(["render", str(film), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    records = list(read_records(tmp_path / "out" / "a"))
    assert [record.block for record in records] == list(range(1, len(records) + 1)) and records
    assert set(records[-1].tiers) == set(TIERS)
    assert {"denoise", "commit", "decode"} <= set(records[-1].stages_s)
    assert records[-1].total("written_bytes") > 0 and records[-1].memory["weights"] > 0


def test_tiers_are_of_all_ranks(tmp_path: Path) -> None:
    tiers = {"device": {"used_bytes": 3, "budget_bytes": 8}, "disk": {"used_bytes": 5, "budget_bytes": None}}
    text = line(1, num_ranks=2, tiers=tiers, stalled_host_s=0.5, stalled_disk_s=0.25, stages_s={"denoise": 0.2})
    (tmp_path / "metrics.jsonl").write_text(text + "torn\n" + line(2))
    first, second = read_records(tmp_path)
    assert first.tiers == {
        "device": TierUse(used_bytes=6, budget_bytes=16),
        "disk": TierUse(used_bytes=10, budget_bytes=None),
    }
    assert (first.stalled_s, first.stages_s, first.total("up_bytes")) == (0.75, {"denoise": 0.2}, 0.0)
    assert (second.block, second.tiers) == (2, {})
