"""What the ranks of a gang say to each other beside their collectives, and beside the news of a failure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A rank's value in the ``number``-th agreement."""

    number: int
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """Rank 0's answer to the ``number``-th agreement."""

    number: int
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Something that rank 0 has all ranks do."""

    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """Something that rank 0 tells beside the tasks."""

    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Dismissed:
    """Rank 0 has no more tasks; processes end with ``code``."""

    code: int
