"""``longtake report DIR``: one HTML page about a film, with pictures, plots and figures, that needs nothing else."""

from __future__ import annotations

import html
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from longtake.jobs.blockrecord import TIERS, BlockRecord, read_records
from longtake.jobs.pictures import shot_pictures
from longtake.jobs.quantities import format_bytes, format_duration
from longtake.jobs.recipe import RECIPE_NAME, read_recipe
from longtake.jobs.status import FilmStatus, ShotStatus, read_status
from longtake.jobs.svg import Series, plot
from longtake.kernels.errors import LongtakeError
from longtake.offload.errors import from_os_error

REPORT_NAME = "report.html"
NUM_PICTURES = 12
_STAGES = ("prepare", "denoise", "commit", "decode", "write")
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1240px;margin:2em auto;padding:0 1em;color:#1f2937;background:#fff}
h1{margin:0}h2{margin:2em 0 .4em;border-bottom:1px solid #e5e7eb}.note{color:#6b7280}
table{border-collapse:collapse;margin:.6em 0}
td,th{padding:.15em .8em .15em 0;text-align:right;white-space:nowrap;vertical-align:top}
td:first-child,th:first-child,td.l{text-align:left}td.l+td.l{white-space:normal}
th{color:#6b7280;font-weight:500}
.sheet{display:flex;flex-wrap:wrap;gap:6px}.sheet div{font-size:12px;color:#6b7280}.sheet img{display:block}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(480px,1fr));gap:14px;margin-top:1em}
figure{margin:0}figcaption{font-weight:600;font-size:14px}svg{width:100%;height:auto}
text{font:11px system-ui,sans-serif;fill:#6b7280}.grid{stroke:#e5e7eb}
.legend{font-size:12px}.legend span{margin-right:1em}
.legend i{display:inline-block;width:10px;height:10px;margin-right:4px}
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title><style>{style}</style></head><body>
{body}
</body></html>
"""


def write_report(directory: Path, out: Path) -> None:
    """Write the page of a film's directory.

    Args:
        directory: the --out of render or submit; may still be rendered.
        out: the file.

    Raises:
        ConfigError: nothing was rendered there.
        StorageError: the status is damaged, or the page cannot be written.
    """
    status = read_status(directory)
    shots = [_shot(directory / name, entry) for name, entry in status.shots.items()]
    body = "\n".join([_head(directory, status), *shots])
    page = _PAGE.format(title=html.escape(status.title), style=_STYLE, body=body)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise from_os_error(error, "writing the report", path=out) from error


def _head(directory: Path, status: FilmStatus) -> str:
    names = ("shot", "state", "frames", "blocks", "device hours", "starts", "")
    rows = [
        [
            name,
            entry.state,
            f"{entry.frames_done} of {entry.num_frames}",
            f"{entry.blocks_done} of {entry.num_blocks}",
            f"{entry.gpu_hours:.3f}" if entry.gpu_hours is not None else "",
            str(entry.num_starts or ""),
            entry.reason or "",
        ]
        for name, entry in status.shots.items()
    ]
    told = [index for index in range(len(names)) if any(row[index] for row in rows)]
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(status.updated_s))
    title = f"<h1>{html.escape(status.title)}</h1>"
    note = f'<p class="note">{html.escape(str(directory))}, {status.state}, as of {when}</p>'
    return title + note + _table([names[index] for index in told], [[row[index] for index in told] for row in rows])


def _shot(folder: Path, entry: ShotStatus) -> str:
    records = list(read_records(folder))
    parts = [f"<h2>{html.escape(folder.name)}</h2>", _figures(folder, records)]
    pictures = shot_pictures(folder, NUM_PICTURES) if entry.blocks_done else []
    if pictures:
        tiles = (
            f'<div><img src="{one.data_url}" alt="">{format_duration(round(one.time_s, 1))}</div>' for one in pictures
        )
        parts.append(f'<div class="sheet">{"".join(tiles)}</div>')
    if records:
        parts.append(f'<div class="plots">{"".join(_plots(records))}</div>')
    return "\n".join(parts)


def _figures(folder: Path, records: Sequence[BlockRecord]) -> str:
    """What a shot is and how it went, as a table of names and values."""
    rows: list[list[str]] = []
    try:
        config = (read_recipe(folder / RECIPE_NAME) or {})["config"]
        size = f"{config['height']}x{config['width']} at {config['fps']} fps, seed {config['seed']}"
        rows.append(["rendered as", f"{config['model']['name']}, {size}, history in {config['cache']['codec']}"])
        if config.get("after"):
            rows.append(["goes on after", f"{config['after']}, with {config['after_blocks']} blocks of it"])
        rows += [[f"from {format_duration(beat['at_s'])}", beat["prompt"]] for beat in config["beats"]]
    except (LongtakeError, ValueError, KeyError, TypeError):
        rows.append(["rendered as", f"its {RECIPE_NAME} is not there or cannot be read"])
    if records:
        seconds = sorted(record.seconds for record in records)
        last, slow = records[-1], seconds[round(0.9 * (len(seconds) - 1))]
        rows.append(["a block", f"{statistics.median(seconds):.3g} s median, {slow:.3g} s the slowest tenth"])
        rows.append(["blocks took", format_duration(round(sum(seconds), 1))])
        rows.append(["waited for the disk", f"{sum(_growth(records, lambda one: one.stalled_s)):.3g} s"])
        if (disk := last.tiers.get("disk")) is not None:
            rows.append(["history on disk", format_bytes(disk.used_bytes)])
        held = sorted(last.memory.items(), key=lambda item: -item[1])
        rows.append(["memory", ", ".join(f"{name} {format_bytes(size)}" for name, size in held if size)])
    return _table([], rows, left=True)


def _plots(records: Sequence[BlockRecord]) -> list[str]:
    def line(name: str, values: Sequence[float], *, dashed: bool = False) -> Series:
        points = [(float(record.block), value) for record, value in zip(records, values, strict=True)]
        return Series(name=name, points=points, dashed=dashed)

    def stage(name: str) -> list[float]:
        return _growth(records, lambda one: one.stages_s.get(name, 0.0))

    def counted(name: str) -> list[float]:
        return _growth(records, lambda one: one.total(name))

    tiers = [name for name in TIERS if any(name in record.tiers for record in records)]
    used = [line(name, [_used(record, name) for record in records]) for name in tiers]
    budgets = [
        line(f"{name} budget", [_budget(record, name) for record in records], dashed=True)
        for name in tiers
        if all(_budget(record, name) for record in records)
    ]
    stages = [name for name in _STAGES if any(name in record.stages_s for record in records)]
    stalls = [line("commits", counted("stalled_host_s")), line("reads", counted("stalled_disk_s"))]
    read = [line("found", counted("num_hits")), line("waited for", counted("num_misses"))]
    disk = [line("written", counted("written_bytes")), line("read", counted("read_bytes"))]
    lag = line("journal lag", [record.total("last_lag_s") for record in records])
    block = line("block", [record.seconds for record in records])
    return [
        _plot("Seconds a block, by stage", [block, *(line(name, stage(name)) for name in stages)], _seconds),
        _plot("History by tier", [*used, *budgets], _bytes, base=1024),
        _plot("Waiting for the disk, seconds a block", [*stalls, lag], _seconds),
        _plot("Blocks of history read", read, lambda count: f"{count:.3g}"),
        _plot("Disk, bytes a block", disk, _bytes, base=1024),
    ]


def _plot(title: str, series: Sequence[Series], y_text: Callable[[float], str], base: int = 1000) -> str:
    return plot(title, series, x_name="block", y_text=y_text, y_base=base)


def _growth(records: Sequence[BlockRecord], total: Callable[[BlockRecord], float]) -> list[float]:
    """What a total has grown by with each block; one that is smaller than before began anew."""
    grown, last = [], 0.0
    for record in records:
        value = total(record)
        grown.append(value - last if value >= last else value)
        last = value
    return grown


def _used(record: BlockRecord, tier: str) -> float:
    return float(record.tiers[tier].used_bytes) if tier in record.tiers else 0.0


def _budget(record: BlockRecord, tier: str) -> float:
    return float(record.tiers[tier].budget_bytes or 0) if tier in record.tiers else 0.0


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


def _bytes(size: float) -> str:
    return format_bytes(round(size))


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    kind = ' class="l"' if left else ""
    head = f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in names)}</tr>" if names else ""
    body = "".join(f"<tr>{''.join(f'<td{kind}>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{head}{body}</table>"
