"""status.json as a table for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from longtake.jobs.quantities import format_bytes, format_duration
from longtake.jobs.source import nearest, quote
from longtake.jobs.status import STATUS_NAME
from longtake.kernels.errors import ConfigError, StorageError

_STYLES = {"RUNNING": "green", "CHECKPOINT": "yellow", "PAUSED": "yellow", "DEAD": "red", "SUCCEEDED": "dim"}
_COLUMNS = ("frames", "fps", "ETA", "GPU h", "device", "host", "disk", "stall", "starts")


def read_status(directory: Path, shot: str | None = None) -> dict[str, Any]:
    """The status file's data, of one shot only if one is named.

    Raises:
        ConfigError: there is none, or no such shot.
        StorageError: it is damaged.
    """
    path = directory / STATUS_NAME
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        shots = data["shots"]
    except FileNotFoundError as error:
        raise ConfigError(f"{directory}: nothing was rendered here (no {STATUS_NAME})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError("the status is damaged; rendering or submitting again writes it anew", path=path) from error
    if shot is not None:
        if shot not in shots:
            raise ConfigError(f"there is no shot {quote(shot)}; {nearest(shot, list(shots))}")
        data["shots"] = {shot: shots[shot]}
    return data


def goes_on(data: dict[str, Any], shot: str | None = None) -> bool:
    """Whether anything more may happen by itself to a film, or to the shot that was read: one dead shot ends no other.

    A shot that depends on a dead one waits for `retry`; others that depend have one before them that goes on.
    """
    settled = {"SUCCEEDED", "DEAD"} if shot is not None else {"SUCCEEDED", "DEAD", "DEPEND"}
    return any(entry["state"] not in settled for entry in data["shots"].values())


def status_table(data: dict[str, Any], now_s: float) -> Table:
    """A row a shot, and the film's below."""
    age = format_duration(max(0, round(now_s - data["updated_s"])))
    table = Table(box=None, pad_edge=False, title=f"{data['title']}: {data['state']}, {age} ago", title_justify="left")
    table.add_column("shot")
    table.add_column("state")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("", overflow="fold")
    for name, entry in data["shots"].items():
        table.add_row(name, entry["state"], *_cells(entry), entry["reason"] or "", style=_STYLES.get(entry["state"]))
    entries = list(data["shots"].values())
    done, total = (sum(entry[key] for entry in entries) for key in ("frames_done", "num_frames"))
    rate = sum(entry["frames_per_s"] or 0 for entry in entries)
    hours = sum(entry.get("gpu_hours") or 0 for entry in entries)
    eta = format_duration(round((total - done) / rate)) if rate else ""
    table.add_section()
    table.add_row("film", data["state"], f"{done}/{total}", f"{rate:.3g}" if rate else "", eta, f"{hours:.2f}")
    return table


def _cells(entry: dict[str, Any]) -> list[str]:
    stalled, starts, hours = entry.get("stalled_s"), entry.get("num_starts"), entry.get("gpu_hours")
    return [
        f"{entry['frames_done']}/{entry['num_frames']}",
        f"{entry['frames_per_s']:.3g}" if entry["frames_per_s"] else "",
        format_duration(round(entry["eta_s"])) if entry["eta_s"] is not None else "",
        f"{hours:.2f}" if hours else "",
        *(
            format_bytes(size) if (size := entry.get(f"{tier}_cache_bytes")) is not None else ""
            for tier in ("device", "host", "disk")
        ),
        f"{stalled:.1f}s" if stalled else "",
        str(starts) if starts else "",
    ]
