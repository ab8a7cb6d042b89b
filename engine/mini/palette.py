"""The world's colours: skies by time of day, walls, roofs, leaves, actors."""

from __future__ import annotations

import numpy as np

from .draws import Floats

TIMES = ("dawn", "day", "dusk", "night")
WEATHERS = ("clear", "fog", "rain", "snow")
COLOURS = ("red", "blue", "yellow", "green", "white", "purple")


def rgb(*hexes: str) -> Floats:
    """Turn hex colours into float64 [n, 3] in [0, 1]."""
    return np.array([[int(h[i : i + 2], 16) / 255 for i in (0, 2, 4)] for h in hexes])


# One row a time of day (dawn, day, dusk, night).
SKY = {
    "zenith": rgb("5d7fc0", "3a7bd0", "33326c", "0b1233"),
    "middle": rgb("d3a9bd", "86bdec", "a9507d", "1a2858"),
    "horizon": rgb("ffdcae", "dfeff6", "ffa263", "3a4c7c"),
    "cloud": rgb("ffdccb", "ffffff", "ffab8f", "303c6a"),
    "mountain": rgb("9a8fb5", "86a4c8", "6a4677", "18224a"),
    "hill": rgb("76897f", "6fa37a", "51435f", "121d35"),
    "shallow": rgb("d9b3b4", "69b4dc", "b9647a", "20316a"),
    "deep": rgb("6b7fae", "2f78b4", "4b3768", "0e1840"),
    "fog": rgb("e4d3cf", "d6dee3", "b8949f", "333f5e"),
    "sun": rgb("ffe3a6", "fff8d8", "ffd27a", "e9eeff"),
    "ambient": np.array([[0.97, 0.84, 0.79], [1.0, 1.0, 1.0], [0.86, 0.62, 0.56], [0.27, 0.33, 0.55]]),
}
WINDOW_LIGHT = rgb("ffd27a")[0]
WINDOW_GLOW = np.array([0.35, 0.0, 0.85, 1.0])  # by time of day
OVERCAST = np.array([0.0, 0.55, 0.85, 0.65])  # by weather: how grey the sky is
FOG = np.array([0.0, 0.9, 0.38, 0.42])  # by weather: how much of what is far is hidden

WALLS = rgb("f3ead8", "efd9b4", "e8b99a", "d98f73", "c9d7dd", "e9c46a", "dba7a7", "f7f4ec")
ROOFS = rgb("b5443a", "8c3b34", "4e5d78", "6b4a3c", "3f7a78", "a85f35")
STONES = rgb("b9b2a6", "a39c94", "c8bca4", "8f95a0")
LEAVES = rgb("4f8a4a", "6fa14c", "3f7450", "8aa644", "c98a3c", "b8613a")
PINES = rgb("2f6650", "37704a", "2c5a5a")
TRUNK = rgb("6b4a34")[0]
GRASS = rgb("7fae5a", "93b562", "a9b06a", "6fa36a", "c2b480", "8fa86e")
SAND = rgb("e0cda0", "d3bd8f", "c9b9a2")
ACTOR = rgb("d8352f", "2f62c9", "f4c32f", "2f9a55", "f6f4ee", "8a49b5")
GLASS = rgb("56687d")[0]
