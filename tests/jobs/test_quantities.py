from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.jobs.quantities import format_bytes, format_duration, parse_bytes, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("45s", 45),
        ("2m", 120),
        ("1h", 3600),
        ("1h30m", 5400),
        ("1h0m1.5s", Fraction(7203, 2)),
        ("0.1s", Fraction(1, 10)),
        ("500ms", Fraction(1, 2)),
        ("1.5h", 5400),
        ("0s", 0),
        ("100s", 100),
    ],
)
def test_durations(text: str, seconds: Fraction) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "45", "s", "-3s", "45 s", "30m1h", "1s1s", "1d", "1,5s", "٣s", "1h30", "1.s", ".5s"]
)
def test_bad_durations(text: str) -> None:
    with pytest.raises(ValueError, match='write it like "45s"'):
        parse_duration(text)


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_duration_adds_up(hours: int, minutes: int, seconds: int) -> None:
    assert parse_duration(f"{hours}h{minutes}m{seconds}s") == hours * 3600 + minutes * 60 + seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (4.5, "4.5s"), (59.94, "59.9s"), (59.96, "1m00s"), (61, "1m01s"), (3599.6, "1h00m"), (5400, "1h30m")],
)
def test_durations_written(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("6GiB", 6 * 2**30), ("500MB", 500 * 10**6), ("64 GiB", 64 * 2**30), ("0.5KiB", 512), ("7B", 7), ("0GiB", 0)],
)
def test_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        ("6", 'no unit; write it like "6GiB"'),
        ("6gib", 'unknown unit gib; write "6GiB"'),
        ("6Gb", 'unknown unit Gb; write "6GB"'),
        ("6 parsecs", 'unknown unit parsecs; write it like "6GiB"'),
        ("-6GiB", "no byte count"),
        ("", "no byte count"),
        ("GiB", "no byte count"),
        ("1e3MB", "no byte count"),
    ],
)
def test_bad_bytes(text: str, mend: str) -> None:
    with pytest.raises(ValueError, match=mend):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.50 KiB"), (10 * 2**20, "10.0 MiB"), (6 * 2**30, "6.00 GiB"),
     (1023 * 2**20, "1.00 GiB"), (4 * 2**50, "4096 TiB")],
)  # fmt: skip
def test_bytes_written(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
