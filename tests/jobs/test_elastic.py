"""How many workers a gang may have on the hosts that there are."""

from __future__ import annotations

import pytest

pytest.importorskip("ray")

from longtake.jobs.elastic import allowed_workers

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
