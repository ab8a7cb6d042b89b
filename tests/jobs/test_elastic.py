"""How many workers a gang may have on the hosts that there are."""

from __future__ import annotations

import pytest

pytest.importorskip("ray")

from longtake.jobs.elastic import MOST_YOUNG_DEATHS, Deaths, allowed_workers

GPU = {"GPU": 1.0, "CPU": 0.0}


@pytest.mark.parametrize(
    ("hosts", "sizes", "number"),
    [
        ((4, 8), (1, 2, 4), 4),
        ((3, 2), (1, 2, 4), 2),
        ((1, 1), (1, 2), 1),  # not two on two hosts
        ((1, 1), (2, 4), 0),
        ((), (1,), 0),
    ],
)
def test_the_largest_allowed_number_on_one_host(hosts: tuple[int, ...], sizes: tuple[int, ...], number: int) -> None:
    resources = {str(index): {"GPU": float(count), "CPU": 64.0} for index, count in enumerate(hosts)}
    assert allowed_workers(resources, GPU, sizes) == number


def test_a_gang_that_dies_young_again_and_again_goes_on_smaller() -> None:
    deaths = Deaths((1, 2, 4))
    now = 0.0
    for number in range(MOST_YOUNG_DEATHS):
        assert deaths.sizes == (1, 2, 4), number
        deaths.started(4, now)
        deaths.ended(now + 10)
        deaths.ended(now + 11)
        now += 20
    assert deaths.sizes == (1, 2)
    deaths.started(2, now)
    deaths.ended(now + 3600)
    assert deaths.sizes == (1, 2), "it lived for an hour"
    for _ in range(10 * MOST_YOUNG_DEATHS):
        deaths.started(deaths.sizes[-1], now)
        deaths.ended(now + 1)
    assert list(deaths.sizes) == [1], "one is left to go on"
