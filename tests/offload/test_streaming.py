"""The ring of a streamed plan: who waits for what, with copies and reads that the test itself ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future

import pytest
import torch
from torch import Tensor

from longtake.offload.lanes import Fence, Lane
from longtake.offload.streaming import HostRun, Ring

LAYERS = 4


class Named(Fence):
    """A fence that says what it stands for."""

    def __init__(self, name: str) -> None:
        self.name = name


class Reads:
    """Disk reads that never begin, except layer 2's; who must be awaited before each may write its slot."""

    def __init__(self) -> None:
        self.after: list[tuple[int, int, set[str]]] = []

    def __call__(self, block: int, layer: int, staging: int, after: Sequence[Fence], slot: int) -> Future[Fence]:
        self.after.append((layer, slot, {fence.name for fence in after if isinstance(fence, Named)}))
        future: Future[Fence] = Future()
        if layer == 2:
            future.set_result(Fence())
        return future


class Noting(Lane):
    """A lane that copies nothing and names its fences."""

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Fence] = ()) -> Fence:
        return Named("copied")


def make_ring(reads: Reads, runs: Sequence[HostRun] = ()) -> Ring:
    """Two slot sets, one page from the disk in each, and one from the host for each run."""
    return Ring(
        pages=[torch.zeros(4, 1, 8, dtype=torch.uint8)] * LAYERS,
        slabs=[torch.zeros(1, 1, 8, dtype=torch.uint8)] * LAYERS,
        lane=Noting(torch.device("cpu")),
        slot_sets=[[0, 1], [2, 3]],
        runs=runs,
        disk_blocks=[(7, 1)],
        read_page=reads,
        after=[Named("former user")],
    )


@pytest.mark.parametrize("runs", [[], [HostRun(first_frame=0, first_place=0, num_blocks=1)]])
def test_slots_of_reads_that_never_began_still_wait_for_who_used_them(runs: list[HostRun]) -> None:
    reads = Reads()
    ring = make_ring(reads, runs)
    assert [(layer, slot) for layer, slot, _ in reads.after] == [(0, 1), (1, 3)]
    assert ring.turn_to(2) == 0  # both layers under way are skipped
    assert [(layer, slot) for layer, slot, _ in reads.after[2:]] == [(2, 1), (3, 3)]
    assert all("former user" in names for _, _, names in reads.after)
    assert all("copied" in names for _, _, names in reads.after[2:]) == bool(runs)
    assert {"former user"} <= {fence.name for fence in ring.stop() if isinstance(fence, Named)}
