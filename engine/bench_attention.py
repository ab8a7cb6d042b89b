"""``longtake bench attention``: encode, unpack and attend, against dense attention; see longtake.kernels.bench."""

from __future__ import annotations

from longtake.kernels.bench import main

__all__ = ["main"]
