"""Pictures as data: landmarks and actors built of quads and ellipses, many at once.

Local coordinates: x to the right, y UP from the foot of the thing, both in pixels of the screen.

Row of a primitive, NUM_FIELDS numbers:

    | 0: is ellipse | 1..12: four edges (a, b, c), inside where a*x + b*y + c > 0 | 13, 14: centre | 15, 16: half size |
    | 17, 18: shade along x, y | 19..21: colour | 22: emission | 23: opacity |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import palette
from .draws import Floats, choice

NUM_FIELDS = 24
MAX_LANDMARK_PRIMITIVES = 20
MAX_ACTOR_PRIMITIVES = 10

Value = Floats | float


class Sheet:
    """Collects the primitives of `count` instances of one kind, painter's order."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.rows: list[Floats] = []

    def _row(self) -> Floats:
        row = np.zeros((self.count, NUM_FIELDS))
        self.rows.append(row)
        return row

    def _finish(self, row: Floats, colour: Floats, shade: tuple[float, float], emission: Value, opacity: Value) -> None:
        row[:, 17], row[:, 18] = shade
        row[:, 19:22] = colour
        row[:, 22] = emission
        row[:, 23] = opacity

    def quad(
        self,
        points: Sequence[tuple[Value, Value]],
        colour: Floats,
        *,
        shade: tuple[float, float] = (-0.10, 0.06),
        emission: Value = 0.0,
        opacity: Value = 1.0,
    ) -> None:
        """Add a convex polygon of three or four corners, in any order of turning."""
        row = self._row()
        corners = np.stack([np.stack(np.broadcast_arrays(np.zeros(self.count) + x, y), -1) for x, y in points], 1)
        if len(points) == 3:
            corners = np.concatenate([corners, corners[:, 2:]], 1)
        x, y = corners[..., 0], corners[..., 1]
        next_x, next_y = np.roll(x, -1, 1), np.roll(y, -1, 1)
        area = (x * next_y - next_x * y).sum(1, keepdims=True)
        edge_x, edge_y = next_x - x, next_y - y
        length = np.hypot(edge_x, edge_y)
        sign = np.where(area >= 0, 1.0, -1.0) / np.where(length < 1e-6, 1.0, length)
        a, b = -edge_y * sign, edge_x * sign
        c = np.where(length < 1e-6, 1e3, -(a * x + b * y))
        row[:, 1:13] = np.stack([a, b, c], -1).reshape(self.count, 12)
        low, high = corners.min(1), corners.max(1)
        row[:, 13:15], row[:, 15:17] = (low + high) / 2, np.maximum((high - low) / 2, 0.5)
        self._finish(row, colour, shade, emission, opacity)

    def box(self, x0: Value, y0: Value, x1: Value, y1: Value, colour: Floats, **style: object) -> None:
        """Add an upright rectangle."""
        self.quad([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, **style)  # type: ignore[arg-type]

    def ellipse(
        self,
        x: Value,
        y: Value,
        radius_x: Value,
        radius_y: Value,
        colour: Floats,
        *,
        shade: tuple[float, float] = (-0.10, 0.16),
        emission: Value = 0.0,
        opacity: Value = 1.0,
    ) -> None:
        """Add an upright ellipse."""
        row = self._row()
        row[:, 0] = 1.0
        row[:, 13], row[:, 14], row[:, 15], row[:, 16] = x, y, radius_x, radius_y
        self._finish(row, colour, shade, emission, opacity)

    def window(self, x: Value, y: Value, width: Value, height: Value, lit: Value = 1.0, opacity: Value = 1.0) -> None:
        """Add a window: dark glass by day, `lit` by night; x, y: middle of its sill."""
        half = np.asarray(width) / 2
        self.box(x - half, y, x + half, y + height, palette.GLASS, shade=(0.0, 0.12), emission=lit, opacity=opacity)

    def table(self, max_primitives: int) -> Floats:
        """Return [count, max_primitives, NUM_FIELDS], padded with invisible rows."""
        table = np.zeros((self.count, max_primitives, NUM_FIELDS))
        table[:, :, 15:17] = 1.0
        table[:, : len(self.rows)] = np.stack(self.rows, 1)
        return table


def _pick(colours: Floats, draws: Floats) -> Floats:
    return np.asarray(colours[choice(draws, len(colours))])


def _house(sheet: Sheet, u: Floats, *, stories: int) -> None:
    wall, roof = _pick(palette.WALLS, u[:, 0]), _pick(palette.ROOFS, u[:, 1])
    half = (9 + 5 * u[:, 2]) if stories == 1 else (7 + 2.5 * u[:, 2])
    height = 10 + 3 * u[:, 3] if stories == 1 else 20 + 6 * u[:, 3]
    rise = 7 + 4 * u[:, 4]
    chimney = np.where(u[:, 5] < 0.5, -0.5, 0.45) * half
    sheet.box(chimney - 1.6, height, chimney + 1.6, height + rise + 1.5, roof * 0.75)
    sheet.box(-half, 0, half, height, wall)
    ridge = np.where(u[:, 6] < 0.5, 0.55, 0.02) * half
    sheet.quad([(-half - 2, height), (half + 2, height), (ridge, height + rise), (-ridge, height + rise)], roof)
    lit = np.where(u[:, 7:11] < 0.7, 1.0, 0.0)
    for row in range(stories):
        sill = 4.5 + row * (height - 4.5) / max(stories, 1) * 0.92 if stories > 1 else 4.5
        for column, side in enumerate((-0.52, 0.52)):
            sheet.window(side * half, sill, 4.0, 4.6, lit[:, (2 * row + column) % 4])
    sheet.box(-1.9, 0, 1.9, 6.4, roof * 0.6, shade=(0.0, 0.05))


def _cottage(sheet: Sheet, u: Floats) -> None:
    _house(sheet, u, stories=1)


def _townhouse(sheet: Sheet, u: Floats) -> None:
    _house(sheet, u, stories=3)


def _lighthouse(sheet: Sheet, u: Floats) -> None:
    band = _pick(palette.rgb("c8372f", "2f5ea8", "3a3f4c"), u[:, 0])
    white = palette.rgb("f7f3ea")[0]
    height = 32 + 6 * u[:, 1]
    foot, top = 6.2 + u[:, 2], 3.8

    def ring(low: float, high: float, colour: Floats) -> None:
        w0, w1 = foot + (top - foot) * low, foot + (top - foot) * high
        y0, y1 = height * low, height * high
        sheet.quad([(-w0, y0), (w0, y0), (w1, y1), (-w1, y1)], colour, shade=(-0.2, 0.0))

    sheet.ellipse(0.0, 0.5, foot + 6, 3.2, _pick(palette.STONES, u[:, 3]))
    ring(0.0, 1.0, white)
    ring(0.16, 0.36, band)
    ring(0.56, 0.76, band)
    sheet.box(-top - 1.8, height, top + 1.8, height + 1.8, palette.rgb("3a3f4c")[0])
    sheet.box(-2.7, height + 1.8, 2.7, height + 6.6, palette.rgb("f2e6b0")[0], emission=1.0)
    sheet.quad([(-4.2, height + 6.6), (4.2, height + 6.6), (0.0, height + 11.0)], band)
    sheet.window(0.0, height * 0.42, 2.4, 4.0)
    sheet.box(-1.7, 0, 1.7, 5.2, palette.rgb("4a4038")[0], shade=(0.0, 0.0))


def _castle(sheet: Sheet, u: Floats) -> None:
    stone = _pick(palette.STONES, u[:, 0])
    roof = _pick(palette.ROOFS, u[:, 1])
    wall, left, right = 13 + 3 * u[:, 2], 24 + 6 * u[:, 3], 22 + 8 * u[:, 4]
    sheet.box(-13, 0, 13, wall, stone)
    for x in (-7.5, 0.0, 7.5):
        sheet.box(x - 2, wall, x + 2, wall + 3, stone * 0.97)
    for x, height in ((-14.5, left), (14.5, right)):
        sheet.box(x - 5, 0, x + 5, height, stone * 0.94, shade=(-0.16, 0.04))
        sheet.quad([(x - 6.5, height), (x + 6.5, height), (x, height + 9)], roof)
        sheet.window(x, height - 9, 2.8, 4.4)
    sheet.box(-3.6, 0, 3.6, 6, palette.rgb("4d3f38")[0], shade=(0.0, 0.0))
    sheet.ellipse(0.0, 6.0, 3.6, 3.4, palette.rgb("4d3f38")[0], shade=(0.0, 0.0))


def _windmill(sheet: Sheet, u: Floats) -> None:
    wall, roof = _pick(palette.WALLS, u[:, 0]), _pick(palette.ROOFS, u[:, 1])
    height = 22 + 4 * u[:, 2]
    sheet.quad([(-7.5, 0), (7.5, 0), (5.0, height), (-5.0, height)], wall, shade=(-0.18, 0.03))
    sheet.ellipse(0.0, height, 5.6, 5.0, roof)
    turn = u[:, 3] * np.pi / 2
    blade = palette.rgb("f4ecd9")[0]
    for quarter in range(4):
        angle = turn + quarter * np.pi / 2
        dx, dy = np.cos(angle), np.sin(angle)
        reach, half = 15.0, 1.7
        base, tip = 3.0, reach
        sheet.quad(
            [
                (base * dx, height + base * dy),
                (tip * dx, height + tip * dy),
                (tip * dx - 2 * half * dy, height + tip * dy + 2 * half * dx),
                (base * dx - 2 * half * dy, height + base * dy + 2 * half * dx),
            ],
            blade,
            shade=(0.0, 0.0),
        )
    sheet.ellipse(0.0, height, 1.8, 1.8, palette.rgb("6b4a3c")[0])
    sheet.window(0.0, height * 0.5, 3.4, 4.2)
    sheet.box(-2, 0, 2, 6, roof * 0.6, shade=(0.0, 0.0))


def _church(sheet: Sheet, u: Floats) -> None:
    wall, roof = _pick(palette.WALLS, u[:, 0]), _pick(palette.ROOFS, u[:, 1])
    side = np.where(u[:, 2] < 0.5, -1.0, 1.0)
    nave, spire = 12 + 2 * u[:, 3], 22 + 5 * u[:, 4]
    sheet.box(-13, 0, 13, nave, wall)
    sheet.quad([(-14.5, nave), (14.5, nave), (11.5, nave + 7), (-11.5, nave + 7)], roof)
    sheet.box(side * 8.5 - 4.6, 0, side * 8.5 + 4.6, spire, wall * 0.96, shade=(-0.14, 0.04))
    sheet.quad([(side * 8.5 - 5.4, spire), (side * 8.5 + 5.4, spire), (side * 8.5, spire + 14)], roof)
    for x in (-8.5, -3.0, 2.5):
        sheet.window(x * side, 4, 2.8, 5.4)
    sheet.ellipse(side * 8.5, spire - 5, 2.1, 2.1, palette.GLASS, emission=1.0)
    sheet.box(side * 8.5 - 1.8, 0, side * 8.5 + 1.8, 6, roof * 0.6, shade=(0.0, 0.0))


def _pines(sheet: Sheet, u: Floats) -> None:
    colour = _pick(palette.PINES, u[:, 0])
    for index, (x, scale) in enumerate(((-9.0, 0.75), (9.5, 0.85), (0.0, 1.0))):
        height = (25 + 9 * u[:, 1 + index]) * scale
        here = x + 3 * (u[:, 4 + index] - 0.5)
        tint = colour * (0.88 + 0.24 * u[:, 7 + index, None])
        sheet.box(here - 1.2, 0, here + 1.2, 5, palette.TRUNK)
        for low, high, width in ((0.14, 0.62, 7.0), (0.38, 0.82, 5.4), (0.62, 1.0, 3.8)):
            half = width * scale
            sheet.quad([(here - half, height * low), (here + half, height * low), (here, height * high)], tint)


def _oak(sheet: Sheet, u: Floats) -> None:
    colour = _pick(palette.LEAVES, u[:, 0])
    height = 15 + 4 * u[:, 1]
    sheet.quad([(-2.4, 0), (2.4, 0), (1.6, height), (-1.6, height)], palette.TRUNK)
    puffs = ((-6.5, 0.0, 7.0), (6.5, 0.5, 7.0), (0.0, -1.0, 8.0), (-3.5, 6.0, 6.5), (3.8, 6.2, 6.3), (0.2, 9.2, 5.2))
    for index, (x, y, radius) in enumerate(puffs):
        wobble = u[:, 2 + index] - 0.5
        tint = colour * (0.86 + 0.022 * (y + 1) + 0.10 * u[:, 8 + index % 4, None])
        sheet.ellipse(x + 2 * wobble, height + y, radius + wobble, radius * 0.88, tint)


def _poplars(sheet: Sheet, u: Floats) -> None:
    colour = _pick(palette.LEAVES[:4], u[:, 0])
    for index, x in enumerate((-10.0, -3.3, 3.4, 10.0)):
        height = 22 + 8 * u[:, 1 + index]
        here = x + 1.5 * (u[:, 5 + index] - 0.5)
        sheet.box(here - 0.9, 0, here + 0.9, 5, palette.TRUNK)
        tint = colour * (0.9 + 0.2 * u[:, 9, None] - 0.04 * (index % 2))
        sheet.ellipse(here, 3 + height / 2, 3.5, height / 2, tint)


def _barn(sheet: Sheet, u: Floats) -> None:
    wall = _pick(palette.rgb("a8403a", "7f4a3a", "5d6f63"), u[:, 0])
    roof = _pick(palette.rgb("5a5560", "6b4a3c", "3f4a5c"), u[:, 1])
    half, height = 13 + 3 * u[:, 2], 11 + 2 * u[:, 3]
    cream = palette.rgb("f3ead8")[0]
    silo = np.where(u[:, 4] < 0.5, -1.0, 1.0) * (half + 4)
    sheet.box(silo - 4, 0, silo + 4, height + 11, palette.STONES[2], shade=(-0.2, 0.0))
    sheet.ellipse(silo, height + 11, 4.0, 3.6, roof)
    sheet.box(-half, 0, half, height, wall)
    sheet.quad([(-half - 1.5, height), (half + 1.5, height), (half * 0.7, height + 6), (-half * 0.7, height + 6)], roof)
    sheet.quad([(-half * 0.7, height + 6), (half * 0.7, height + 6), (0.0, height + 10)], roof * 1.06)
    sheet.box(-4.6, 0, 4.6, 8.4, cream)
    sheet.box(-3.6, 0, 3.6, 7.4, wall * 0.75, shade=(0.0, 0.0))
    sheet.window(0.0, height + 1.2, 3.6, 3.4, np.where(u[:, 5] < 0.6, 1.0, 0.0))


def _water_tower(sheet: Sheet, u: Floats) -> None:
    tank = _pick(palette.rgb("4f8fa8", "c9574a", "d8c9a0", "7d8f9c"), u[:, 0])
    height = 18 + 6 * u[:, 1]
    steel = palette.rgb("6a6f7a")[0]
    for x in (-6.0, 6.0):
        sheet.quad([(x * 1.2 - 0.9, 0), (x * 1.2 + 0.9, 0), (x + 0.9, height), (x - 0.9, height)], steel)
    sheet.box(-7.0, height * 0.45, 7.0, height * 0.45 + 1.6, steel)
    sheet.box(-1.3, 0, 1.3, height, steel * 0.9)
    sheet.box(-8.5, height, 8.5, height + 11, tank, shade=(-0.22, 0.04))
    sheet.ellipse(0.0, height, 8.5, 3.2, tank * 0.86, shade=(-0.22, 0.0))
    sheet.quad([(-9.5, height + 11), (9.5, height + 11), (0.0, height + 17)], tank * 0.7)


LANDMARKS: dict[str, Callable[[Sheet, Floats], None]] = {
    "lighthouse": _lighthouse,
    "cottage": _cottage,
    "townhouse": _townhouse,
    "castle": _castle,
    "windmill": _windmill,
    "church": _church,
    "pines": _pines,
    "oak": _oak,
    "poplars": _poplars,
    "barn": _barn,
    "water tower": _water_tower,
}


def _boat(sheet: Sheet, colour: Floats) -> None:
    sail = palette.rgb("f8f3e6")[0]
    sheet.box(-0.7, 4, 0.7, 25, palette.rgb("5a4334")[0])
    sheet.quad([(1.3, 7), (12.5, 7.5), (1.3, 24)], sail)
    sheet.quad([(-1.3, 8), (-9.5, 8), (-1.3, 21)], sail * 0.92)
    sheet.quad([(-14, 6), (16, 6.5), (11, 0), (-11, 0)], colour, shade=(0.05, 0.14))
    sheet.quad([(-14, 6), (16, 6.5), (15, 4.8), (-13, 4.4)], palette.rgb("fbf6ea")[0], shade=(0.0, 0.0))


def _balloon(sheet: Sheet, colour: Floats) -> None:
    light = 0.35 * colour + 0.65 * palette.rgb("fff6e2")[0]
    sheet.quad([(-3.2, 5), (3.2, 5), (6.0, 13), (-6.0, 13)], palette.rgb("8a7a66")[0], opacity=0.45)
    sheet.box(-3, 0, 3, 5, palette.rgb("8a5a34")[0])
    sheet.quad([(-8.6, 16), (8.6, 16), (3.4, 9), (-3.4, 9)], colour * 0.9)
    sheet.ellipse(0.0, 22.0, 10.8, 11.2, colour, shade=(-0.16, 0.14))
    sheet.ellipse(0.0, 22.0, 4.2, 11.2, light, shade=(-0.06, 0.10))


def _bird(sheet: Sheet, colour: Floats) -> None:
    sheet.quad([(-1.0, 12.8), (3.0, 13.2), (-7.5, 18.2), (-12.5, 18.0)], colour * 0.84)
    sheet.quad([(-5.0, 13.4), (-5.0, 11.6), (-9.0, 11.0), (-9.5, 14.4)], colour * 0.8)
    sheet.ellipse(0.2, 12.6, 6.2, 2.1, colour)
    sheet.quad([(-2.6, 13.0), (2.0, 13.0), (12.0, 18.0), (7.0, 18.2)], colour * 0.96)
    sheet.ellipse(6.0, 13.7, 2.3, 2.0, colour)
    sheet.quad([(7.6, 14.6), (7.6, 12.8), (10.6, 13.5)], palette.rgb("f0a030")[0])


def _cart(sheet: Sheet, colour: Floats) -> None:
    wheel = palette.rgb("3a322c")[0]
    sheet.box(-9.5, 4, 9.5, 11, colour, shade=(-0.06, 0.14))
    sheet.quad([(-10.5, 11), (10.5, 11), (7.5, 17), (-7.5, 17)], palette.rgb("f6ecd4")[0])
    sheet.box(9.5, 5, 14.5, 6.4, palette.TRUNK)
    for x in (-6.0, 6.0):
        sheet.ellipse(x, 3.6, 3.7, 3.7, wheel)
        sheet.ellipse(x, 3.6, 1.7, 1.7, palette.rgb("c9a86a")[0])


ACTORS: dict[str, Callable[[Sheet, Floats], None]] = {
    "boat": _boat,
    "balloon": _balloon,
    "bird": _bird,
    "cart": _cart,
}


def landmark_table(kinds: np.ndarray, draws: Floats) -> Floats:
    """Build the primitives of landmarks.

    Args:
        kinds: int [N], index into LANDMARKS.
        draws: float64 [N, >= 12] in [0, 1).

    Returns:
        [N, MAX_LANDMARK_PRIMITIVES, NUM_FIELDS].
    """
    table = np.zeros((len(kinds), MAX_LANDMARK_PRIMITIVES, NUM_FIELDS))
    for index, build in enumerate(LANDMARKS.values()):
        chosen = np.nonzero(kinds == index)[0]
        sheet = Sheet(len(chosen))
        if len(chosen):
            build(sheet, draws[chosen])
            table[chosen] = sheet.table(MAX_LANDMARK_PRIMITIVES)
    return table


def actor_table(kinds: np.ndarray, colours: np.ndarray) -> Floats:
    """Build the primitives of actors facing right.

    Args:
        kinds: int [N], index into ACTORS; -1: nobody.
        colours: int [N], index into palette.COLOURS.

    Returns:
        [N, MAX_ACTOR_PRIMITIVES, NUM_FIELDS].
    """
    table = np.zeros((len(kinds), MAX_ACTOR_PRIMITIVES, NUM_FIELDS))
    table[:, :, 15:17] = 1.0
    for index, build in enumerate(ACTORS.values()):
        chosen = np.nonzero(kinds == index)[0]
        sheet = Sheet(len(chosen))
        if len(chosen):
            build(sheet, palette.ACTOR[colours[chosen]])
            table[chosen] = sheet.table(MAX_ACTOR_PRIMITIVES)
    return table
