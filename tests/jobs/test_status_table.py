"""When there is nothing more to follow."""

from __future__ import annotations

import pytest

from longtake.jobs.status_table import goes_on


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (("DEAD", "RUNNING"), True),
        (("DEAD", "WAITING"), True),
        (("SUCCEEDED", "PAUSED"), True),
        (("SUCCEEDED", "DEAD", "DEPEND"), False),
        (("SUCCEEDED", "SUCCEEDED"), False),
    ],
)
def test_a_film_goes_on_while_a_shot_may(states: tuple[str, ...], expected: bool) -> None:
    assert goes_on({"shots": {str(number): {"state": state} for number, state in enumerate(states)}}) is expected


@pytest.mark.parametrize(("state", "expected"), [("DEPEND", True), ("RUNNING", True), ("DEAD", False)])
def test_one_shot_goes_on_until_it_has_ended(state: str, expected: bool) -> None:
    assert goes_on({"state": "DEAD", "shots": {"a": {"state": state}}}, "a") is expected
