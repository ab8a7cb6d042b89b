"""Random numbers as a pure function of (seed, what they are for), the same in any batch and on any machine."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One splitmix64 finaliser (Steele et al. 2014), element by element."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)) & _MASK
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seeds: Sequence[int] | NDArray[np.int64], purpose: str, count: int) -> Floats:
    """Draw uniform numbers for every seed.

    Args:
        seeds: W non-negative integers.
        purpose: a name; different names give independent numbers.
        count: numbers a seed.

    Returns:
        float64 [W, count] in [0, 1).
    """
    keys = _mix(np.asarray(seeds, dtype=np.uint64) ^ np.uint64(zlib.crc32(purpose.encode()) << 20))
    counter = np.arange(count, dtype=np.uint64)[None, :]
    return np.asarray((_mix(keys[:, None] + counter) >> np.uint64(11)).astype(np.float64) / 2.0**53)


def choice(draws: Floats, count: int) -> NDArray[np.int64]:
    """Turn uniform draws into integers below `count`."""
    return np.minimum((draws * count).astype(np.int64), count - 1)
