"""status.json as a table for people."""

from __future__ import annotations

from rich.table import Table

from longtake.jobs.quantities import format_bytes, format_duration
from longtake.jobs.status import FilmStatus, ShotStatus, State

_STYLES = {"RUNNING": "green", "CHECKPOINT": "yellow", "PAUSED": "yellow", "DEAD": "red", "SUCCEEDED": "dim"}
_COLUMNS = ("frames", "fps", "ETA", "GPU h", "device", "host", "disk", "stall", "starts")


def goes_on(status: FilmStatus, shot: str | None = None) -> bool:
    """Whether anything more may happen by itself to a film, or to the shot that was read: one dead shot ends no other.

    A shot that depends on a dead one waits for `retry`; others that depend have one before them that goes on.
    """
    settled = {State.SUCCEEDED, State.DEAD} if shot is not None else {State.SUCCEEDED, State.DEAD, State.DEPEND}
    return any(entry.state not in settled for entry in status.shots.values())


def status_table(status: FilmStatus, now_s: float) -> Table:
    """A row a shot, and the film's below."""
    age = format_duration(max(0, round(now_s - status.updated_s)))
    table = Table(box=None, pad_edge=False, title=f"{status.title}: {status.state}, {age} ago", title_justify="left")
    table.add_column("shot")
    table.add_column("state")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("", overflow="fold")
    entries = list(status.shots.values())
    for name, entry in status.shots.items():
        table.add_row(name, entry.state, *_cells(entry), entry.reason or "", style=_STYLES.get(entry.state))
    done, total = sum(entry.frames_done for entry in entries), sum(entry.num_frames for entry in entries)
    rate = sum(entry.frames_per_s or 0 for entry in entries)
    hours = sum(entry.gpu_hours or 0 for entry in entries)
    eta = format_duration(round((total - done) / rate)) if rate else ""
    table.add_section()
    table.add_row("film", status.state, f"{done}/{total}", f"{rate:.3g}" if rate else "", eta, _hours(hours))
    return table


def _cells(entry: ShotStatus) -> list[str]:
    tiers = (entry.device_cache_bytes, entry.host_cache_bytes, entry.disk_cache_bytes)
    return [
        f"{entry.frames_done}/{entry.num_frames}",
        f"{entry.frames_per_s:.3g}" if entry.frames_per_s else "",
        format_duration(round(entry.eta_s)) if entry.eta_s is not None else "",
        _hours(entry.gpu_hours),
        *(format_bytes(size) if size is not None else "" for size in tiers),
        f"{entry.stalled_s:.1f}s" if entry.stalled_s else "",
        str(entry.num_starts or ""),
    ]


def _hours(hours: float | None) -> str:
    return f"{hours:.2f}" if hours else ""
