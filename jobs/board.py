"""The Grafana board: ``python -m longtake.jobs.board`` puts it beside the boards that Ray provisions."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from longtake.kernels.errors import ConfigError

BOARD = Path(__file__).parent / "grafana" / "longtake.json"
RAY_BOARDS = Path("/tmp/ray/session_latest/metrics/grafana/dashboards")
_METRIC = re.compile(r"\bray_longtake_\w+")


def board_metrics() -> set[str]:
    """Names of all metrics that the board's panels ask for."""
    panels = json.loads(BOARD.read_text())["panels"]
    return {name for panel in panels for target in panel["targets"] for name in _METRIC.findall(target["expr"])}


def install(folder: Path = RAY_BOARDS) -> Path:
    """Copy the board into a folder that Grafana provisions from; returns where it is.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; start Ray on this host first, or name Grafana's own folder")
    return Path(shutil.copy(BOARD, folder / BOARD.name))


if __name__ == "__main__":
    try:
        print(install(*map(Path, sys.argv[1:2])))
    except ConfigError as error:
        sys.exit(f"longtake: {error}")
