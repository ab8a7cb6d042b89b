"""What a person sees while a film renders: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from longtake.jobs.quantities import format_bytes, format_duration

LINE_INTERVAL_S = 5.0
_WINDOW = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Where a film stands after a block.

    Args:
        shot: its name.
        blocks_done, num_blocks: blocks of the shot.
        frames_done, num_frames: its video frames; decoding may lag behind the blocks.
        film_frames_done: as ``frames_done``, with the shots before it.
        frames_per_s: video frames.
        shot_eta_s, film_eta_s: seconds to the end of the shot and of all shots to be rendered.
        device_cache_bytes: of the shot's history.
    """

    shot: str
    blocks_done: int
    num_blocks: int
    frames_done: int
    num_frames: int
    film_frames_done: int
    frames_per_s: float
    shot_eta_s: float
    film_eta_s: float
    device_cache_bytes: int


class RateMeter:
    """Blocks a second over the last few blocks, everything included that happens between them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque(maxlen=_WINDOW)

    def mark(self, blocks_done: int, block_s: float) -> float:
        """Note a finished block and return the rate; the first block's is from its own seconds, ``block_s``."""
        self._marks.append((self._clock(), blocks_done))
        (first_s, first_blocks), (last_s, last_blocks) = self._marks[0], self._marks[-1]
        if last_blocks > first_blocks and last_s > first_s:
            return (last_blocks - first_blocks) / (last_s - first_s)
        return 1 / max(block_s, 1e-9)


class Display(Protocol):
    """Shows a film's progress; a context manager."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def report(self, report: Report) -> None:
        """A block is done."""

    def shot_done(self, shot: str, film_frames_done: int, video: Path) -> None:
        """A shot is finished and its video in place."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""


def plain_console(width: int | None = None) -> Console:
    """A console that takes words as they are: a title, a reason or a path is no markup and no emoji."""
    return Console(width=width, markup=False, emoji=False, highlight=False)


def make_display(console: Console, film_num_frames: int) -> Display:
    """A bar if the console is a terminal, lines otherwise."""
    return BarDisplay(console, film_num_frames) if console.is_terminal else LineDisplay(console)


def describe(report: Report) -> str:
    """The line of a report: ``arrival block 3/7, frames 33/81, 4.1 fps, ETA 12s, cache 3.20 MiB``."""
    return (
        f"{report.shot} block {report.blocks_done}/{report.num_blocks}, "
        f"frames {report.frames_done}/{report.num_frames}, {_rate(report)}"
    )


def _rate(report: Report) -> str:
    return (
        f"{report.frames_per_s:.3g} fps, ETA {format_duration(report.film_eta_s)}, "
        f"cache {format_bytes(report.device_cache_bytes)}"
    )


class LineDisplay:
    """Plain lines: a shot's first and last block, and in between no more than one in ``LINE_INTERVAL_S``."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._shot: str | None = None
        self._shown_s = 0.0

    def __enter__(self) -> LineDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def report(self, report: Report) -> None:
        """A block is done."""
        now = self._clock()
        last = report.blocks_done == report.num_blocks
        if report.shot != self._shot or last or now - self._shown_s >= LINE_INTERVAL_S:
            self._shot, self._shown_s = report.shot, now
            self.note(describe(report))

    def shot_done(self, shot: str, film_frames_done: int, video: Path) -> None:
        """A shot is finished and its video in place."""
        self.note(f"{shot} -> {video}")

    def note(self, text: str) -> None:
        """Something worth a line of its own."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class BarDisplay:
    """One bar for the whole film, on a terminal."""

    def __init__(self, console: Console, film_num_frames: int) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} frames"),
            TextColumn("{task.fields[rate]}", markup=False),
            console=console,
        )
        self._task = self._bar.add_task("loading", total=film_num_frames, rate="")

    def __enter__(self) -> BarDisplay:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def report(self, report: Report) -> None:
        """A block is done."""
        self._bar.update(
            self._task,
            description=f"{report.shot} {report.blocks_done}/{report.num_blocks}",
            completed=report.film_frames_done,
            rate=_rate(report),
            refresh=True,
        )

    def shot_done(self, shot: str, film_frames_done: int, video: Path) -> None:
        """A shot is finished and its video in place."""
        self._bar.update(self._task, description=shot, completed=film_frames_done, rate="", refresh=True)
        self.note(f"{shot} -> {video}")

    def note(self, text: str) -> None:
        """Something worth a line of its own."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
