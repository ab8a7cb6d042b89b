from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from longtake.jobs.progress import BarDisplay, LineDisplay, RateMeter, Report, describe, make_display


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def report(blocks_done: int, shot: str = "arrival") -> Report:
    return Report(
        shot=shot,
        blocks_done=blocks_done,
        num_blocks=7,
        frames_done=12 * blocks_done - 3,
        num_frames=81,
        film_frames_done=12 * blocks_done - 3,
        frames_per_s=4.125,
        shot_eta_s=11.6,
        film_eta_s=75,
        device_cache_bytes=3 << 20,
    )


def test_the_line_of_a_report() -> None:
    assert describe(report(3)) == "arrival block 3/7, frames 33/81, 4.12 fps, ETA 1m15s, cache 3.00 MiB"


def test_lines_are_few_but_the_first_and_last_of_a_shot_are_there() -> None:
    out, clock = io.StringIO(), Clock()
    with LineDisplay(Console(file=out, width=40), clock) as display:
        for blocks_done in range(1, 8):
            clock.now += 2
            display.report(report(blocks_done))
        display.shot_done("arrival", 81, Path("out/[arrival]/arrival.mp4"))
        display.report(report(1, "quay"))
    lines = out.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "arrival block 1/7",
        "arrival block 4/7",
        "arrival block 7/7",
        "arrival -> out/[arrival]/arrival.mp4",
        "quay block 1/7",
    ]


def test_the_bar_on_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    assert isinstance(make_display(console, 81), BarDisplay)
    assert isinstance(make_display(Console(file=out), 81), LineDisplay)
    with make_display(console, 81) as display:
        display.report(report(3))
        display.note("a [note] of one line")
        display.shot_done("arrival", 81, Path("arrival.mp4"))
    text = out.getvalue()
    for part in ("arrival 3/7", "4.12 fps, ETA 1m15s, cache 3.00 MiB", "a [note] of one line", "81/81 frames"):
        assert part in text


def test_rate_is_over_the_last_blocks_with_everything_between_them() -> None:
    clock = Clock()
    meter = RateMeter(clock)
    clock.now = 100.0
    assert meter.mark(11, 0.5) == 2.0
    for blocks_done in range(12, 40):
        clock.now += 0.25 if blocks_done < 31 else 1.0
        rate = meter.mark(blocks_done, 0.1)
    assert rate == 1.0
    assert RateMeter(clock).mark(1, 0.0) > 0
