"""Durations and byte counts as people write them: "45s", "1h30m", "6GiB". Exact: fractions and integers, no floats."""

from __future__ import annotations

import re
from fractions import Fraction

_SECONDS = {"h": 3600, "m": 60, "s": 1}
_NUMBER = r"\d{1,18}(?:\.\d{1,18})?"
_DURATION = re.compile(rf"(?:(?P<h>{_NUMBER})h)?(?:(?P<m>{_NUMBER})m)?(?:(?P<s>{_NUMBER})s)?", re.ASCII)
_MILLISECONDS = re.compile(rf"({_NUMBER})ms", re.ASCII)
_MAX_QUOTED = 40

BYTE_UNITS = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_BYTES = re.compile(rf"({_NUMBER}) ?([A-Za-z]*)", re.ASCII)


def parse_duration(text: str) -> Fraction:
    """Read a duration.

    Args:
        text: hours, minutes and seconds in this order, each optional and possibly with decimals ("1h30m", "2m",
            "4.5s"), or milliseconds alone ("500ms").

    Returns:
        Seconds, exactly.

    Raises:
        ValueError: the text is no duration; the message says what one looks like.
    """
    if (match := _MILLISECONDS.fullmatch(text)) is not None:
        return Fraction(match[1]) / 1000
    match = _DURATION.fullmatch(text)
    if not text or match is None:
        raise ValueError(f'"{_short(text)}" is no duration; write it like "45s", "2m", "1h30m" or "4.5s"')
    return sum((Fraction(number) * _SECONDS[unit] for unit, number in match.groupdict("0").items()), Fraction(0))


def format_duration(seconds: Fraction | float) -> str:
    """Write seconds as people read them: "45s", "1h02m", "4.5s"; below a minute to a tenth, above it to a second."""
    if seconds < 59.95:
        return f"{float(seconds):.1f}".removesuffix(".0") + "s"
    total = round(seconds)
    hours, minutes, rest = total // 3600, total % 3600 // 60, total % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s"


def parse_bytes(text: str) -> int:
    """Read a byte count.

    Args:
        text: a number and a unit: KiB, MiB, GiB, TiB (powers of 1024), kB, MB, GB, TB (powers of 1000) or B.

    Returns:
        Bytes; a fraction of a byte is rounded down.

    Raises:
        ValueError: the text is no byte count; the message says what one looks like.
    """
    match = _BYTES.fullmatch(text)
    if match is None:
        raise ValueError(f'"{_short(text)}" is no byte count; write it like "6GiB" or "500MB"')
    number, unit = match.groups()
    if unit not in BYTE_UNITS:
        meant = next((known for known in BYTE_UNITS if known.lower() == unit.lower()), None)
        mend = f'write "{number}{meant}"' if meant else 'write it like "6GiB" or "500MB"'
        named = f"the unknown unit {_short(unit)}" if unit else "no unit"
        raise ValueError(f'"{_short(text)}" has {named}; {mend}')
    return int(Fraction(number) * BYTE_UNITS[unit])


def _short(text: str) -> str:
    return text if len(text) <= _MAX_QUOTED else f"{text[: _MAX_QUOTED - 3]}..."


def format_bytes(num_bytes: int) -> str:
    """Write bytes as people read them, in powers of 1024 and three or four digits: "512 B", "1.50 GiB"."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1000 or unit == "TiB":
            break
        size /= 1024
    if unit == "B":
        return f"{num_bytes} B"
    return f"{size:.{2 if size < 10 else 1 if size < 100 else 0}f} {unit}"
