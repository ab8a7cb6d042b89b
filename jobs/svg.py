"""Line plots as SVG text: no script, no font, nothing to fetch."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 10, 30
_MOST_POINTS = 500
COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4b5563")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line: (x, y) points in the order of x; ``dashed`` for limits."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def plot(
    title: str, series: Sequence[Series], *, x_name: str, y_text: Callable[[float], str], y_base: int = 1000
) -> str:
    """A figure with a caption and a legend; a note in its place where there is nothing to draw.

    Args:
        title: of the figure.
        series: lines; those without points are left out.
        x_name: what x counts.
        y_text: writes a value at the y axis, which begins at 0.
        y_base: of the units that it writes in, so that the axis ends at a round number: 1000, or 1024 for bytes.
    """
    drawn = [one for one in series if one.points]
    if not any(y > 0 for one in drawn for _, y in one.points):
        note = "none" if drawn else "nothing was recorded"
        return f'<figure><figcaption>{html.escape(title)}</figcaption><p class="note">{note}</p></figure>'
    xs = [x for one in drawn for x, _ in one.points]
    low, high = min(xs), max(max(xs), min(xs) + 1)
    top = _nice(max(y for one in drawn for _, y in one.points), y_base)

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)
        return f"{across:.1f},{HEIGHT - _BOTTOM - y / top * (HEIGHT - _TOP - _BOTTOM):.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    parts += _axes(low, high, top, x_name, y_text)
    for index, one in enumerate(drawn):
        path = " ".join(place(x, y) for x, y in thinned(one.points))
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
        if len(one.points) == 1:
            across, down = place(*one.points[0]).split(",")
            parts.append(f'<circle cx="{across}" cy="{down}" r="2.5" fill="{colour}"/>')
    parts.append("</svg>")
    legend = " ".join(
        f'<span><i style="background:{COLOURS[index % len(COLOURS)]}"></i>{html.escape(one.name)}</span>'
        for index, one in enumerate(drawn)
    )
    caption = f"<figcaption>{html.escape(title)}</figcaption>"
    return f'<figure>{caption}{"".join(parts)}<div class="legend">{legend}</div></figure>'


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points that a line stays small; of neighbours the highest stays, so that no peak is lost."""
    size = -(-len(points) // _MOST_POINTS)
    return [max(points[first : first + size], key=lambda point: point[1]) for first in range(0, len(points), size)]


def _nice(most: float, base: int) -> float:
    """The round number at or above a value, in units of a power of ``base``; its quarters are round as well."""
    scale = float(base) ** math.floor(math.log(most, base))
    unit = scale * 10.0 ** math.floor(math.log10(most / scale))
    return next(unit * step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12) if unit * step >= most * (1 - 1e-12))


def _axes(low: float, high: float, top: float, x_name: str, y_text: Callable[[float], str]) -> list[str]:
    parts, right, floor = [], WIDTH - _RIGHT, HEIGHT - _BOTTOM
    for step in range(5):
        down = floor - step / 4 * (floor - _TOP)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{down:.1f}" y2="{down:.1f}" class="grid"/>')
        label = html.escape(y_text(top * step / 4))
        parts.append(f'<text x="{_LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{label}</text>')
    for share in (0.0, 0.5, 1.0):
        across, anchor = _LEFT + share * (right - _LEFT), ("start", "middle", "end")[round(2 * share)]
        text = f"{low + share * (high - low):.0f}"
        parts.append(f'<text x="{across:.1f}" y="{floor + 14}" text-anchor="{anchor}">{text}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{html.escape(x_name)}</text>')
    return parts
