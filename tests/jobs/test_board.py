"""The Grafana board is well formed; tests/ray checks that its metrics are exported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from longtake.jobs.board import BOARD, board_metrics, install
from longtake.kernels.errors import ConfigError

METRICS = Path(__file__).parents[2] / "jobs" / "metrics.py"


def test_panels_ask_for_declared_metrics() -> None:
    names = {name: kind for kind, name in re.findall(r'(Counter|Gauge|Histogram)\(\s*"(\w+)"', METRICS.read_text())}
    suffix = {"Counter": "_total", "Gauge": "", "Histogram": "_bucket"}
    assert names
    assert board_metrics() == {f"ray_{name}{suffix[kind]}" for name, kind in names.items()}


def test_the_board_is_one_that_grafana_reads() -> None:
    board = json.loads(BOARD.read_text())
    assert board["uid"] == "longtake"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for panel in board["panels"]:
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables
            assert target["expr"].count("(") == target["expr"].count(")")


def test_installing(tmp_path: Path) -> None:
    assert install(tmp_path).read_bytes() == BOARD.read_bytes()
    with pytest.raises(ConfigError, match="no such folder"):
        install(tmp_path / "nowhere")
