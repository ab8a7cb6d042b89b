"""The tables that the command line prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from longtake.engine.config import ModelSpec
from longtake.engine.presets import Preset
from longtake.jobs.plan import ShotPlan, seconds_on
from longtake.jobs.progress import plain_console
from longtake.jobs.quantities import format_bytes, format_duration

PIPE_COLUMNS = 200


def table_console() -> Console:
    """A console for tables on stdout; where that is no terminal, wide enough that nothing is cut."""
    console = plain_console()
    return console if console.is_terminal else plain_console(PIPE_COLUMNS)


def print_table(table: Table) -> None:
    """Print on stdout."""
    table_console().print(table)


def plan_table(plans: list[ShotPlan], num_gangs: int = 1) -> Table:
    """A film's plan, a shot a row; the film's device bytes are those of its largest shot."""
    table = Table(box=None, pad_edge=False)
    table.add_column("shot")
    names = ("frames", "length", "blocks", "attends", "codec", "device", "arena", "weights", "host", "disk")
    for name in (*names, "history", "bf16", "render"):
        table.add_column(name, justify="right")
    for plan in plans:
        blocks = f"{plan.num_prefix_blocks}+{plan.num_blocks}" if plan.num_prefix_blocks else str(plan.num_blocks)
        sizes = (plan.device_bytes, plan.arena_bytes, plan.weights_bytes, plan.host_bytes, plan.disk_bytes)
        table.add_row(
            plan.name,
            str(plan.num_frames),
            format_duration(plan.num_frames / plan.fps),
            blocks,
            str(plan.attended_blocks),
            f"{plan.codec} ({plan.bits_per_element:.2f} bit)",
            *(format_bytes(size) for size in (*sizes, plan.history_bytes, plan.dense_history_bytes)),
            _seconds(plan.seconds),
        )
    table.add_section()
    table.add_row(
        "film",
        str(sum(plan.num_frames for plan in plans)),
        format_duration(sum(plan.num_frames / plan.fps for plan in plans)),
        str(sum(plan.num_blocks for plan in plans)),
        *["", ""],
        format_bytes(max(plan.device_bytes for plan in plans)),
        *["", ""],
        format_bytes(num_gangs * max(plan.host_bytes for plan in plans)),
        *(
            format_bytes(sum(getattr(plan, name) for plan in plans))
            for name in ("disk_bytes", "history_bytes", "dense_history_bytes")
        ),
        _seconds(seconds_on(plans, num_gangs)),
    )
    return table


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return "under 1s" if seconds < 1 else format_duration(round(seconds, 1 if seconds < 10 else 0))


def models_table(specs: Mapping[str, ModelSpec | str]) -> Table:
    """Models by name; one that cannot be read has the reason instead."""
    table = Table(box=None, pad_edge=False)
    for name in ("name", "size", "fps", "block", "steps", "layers", "width", "disk", "folder"):
        table.add_column(name, overflow="fold")
    for name, spec in specs.items():
        if isinstance(spec, str):
            table.add_row(name, *[""] * 7, spec)
            continue
        table.add_row(
            name,
            f"{spec.height}x{spec.width}",
            str(spec.fps),
            f"{spec.block_frames} latent frame{'s' * (spec.block_frames > 1)}",
            str(len(spec.sampler.timesteps)),
            str(spec.transformer.num_layers),
            str(spec.transformer.dim),
            format_bytes(folder_bytes(spec.path)),
            str(spec.path),
        )
    return table


def presets_table(presets: Mapping[str, Preset]) -> Table:
    """What can be fetched."""
    table = Table(box=None, pad_edge=False)
    for name in ("name", "size", "fps", "block", "steps", "layers", "width", "licence", "what it is"):
        table.add_column(name, overflow="fold")
    for name, preset in presets.items():
        table.add_row(
            name,
            f"{preset.height}x{preset.width}",
            str(preset.fps),
            f"{preset.block_frames} latent frame{'s' * (preset.block_frames > 1)}",
            str(len(preset.sampler.timesteps)),
            str(preset.transformer.num_layers),
            str(preset.transformer.dim),
            preset.licence or "see its card",
            preset.summary,
        )
    return table


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
