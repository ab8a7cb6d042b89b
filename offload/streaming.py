"""A plan larger than the device budget: its pages pass through a ring of staging slots, layer by layer, every pass.

    ring slot set 0   layer l      being attended
    ring slot set 1   layer l+1    arriving
    ...               (depth sets; each has one slot for each streamed block)

When the caller asks for a layer, everything it queued for the layer before is on its stream; a fence there frees that
layer's slots, and the copies of the next layer not yet under way are queued behind it. Blocks come from host frames
that the plan holds, or, where host memory is too small as well, page by page from the disk.

Legend: G slots, L layers, N blocks of a plan, K streamed ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longtake.kernels.errors import StorageError
from longtake.offload.arena import to_device
from longtake.offload.lanes import Fence, Lane, mark
from longtake.offload.shape import ModelKVShape

PageReader = Callable[[int, int, int, Sequence[Fence], int], "Future[Fence]"]
"""(block, layer, staging slot, fences that free the ring slot, ring slot) -> the copy's fence, some time later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRun:
    """Neighbouring host frames that go to neighbouring places of every slot set: one copy a layer."""

    first_frame: int
    first_place: int
    num_blocks: int


def host_runs(frames: Sequence[int], slot_sets: Sequence[Sequence[int]]) -> list[HostRun]:
    """Join host frames, given in order of place, into the longest runs that are contiguous at both ends in all sets."""
    runs: list[HostRun] = []
    for place, frame in enumerate(frames):
        last = runs[-1] if runs else None
        if (
            last is not None
            and frame == last.first_frame + last.num_blocks
            and all(slots[place] == slots[place - 1] + 1 for slots in slot_sets)
        ):
            runs[-1] = HostRun(
                first_frame=last.first_frame, first_place=last.first_place, num_blocks=last.num_blocks + 1
            )
        else:
            runs.append(HostRun(first_frame=frame, first_place=place, num_blocks=1))
    return runs


def ring_tables(
    blocks: Sequence[int],
    resident_frames: dict[int, int],
    places: dict[int, int],
    slot_sets: Sequence[Sequence[int]],
    shape: ModelKVShape,
    device: torch.device,
) -> Tensor:
    """The slots of a plan for every slot set and layer, in one copy to the device.

    Args:
        blocks: of the plan, in reading order.
        resident_frames: device frame of each resident block.
        places: place in a slot set of each streamed block.
        slot_sets: arena slots of each set.
        shape: of a block.
        device: where the tables are wanted.

    Returns:
        int32 [depth, L, N].
    """
    first_L1 = torch.tensor(shape.first_rows, dtype=torch.int32)[:, None]
    step_N = torch.tensor([int(block in resident_frames) for block in blocks], dtype=torch.int32)
    tables = []
    for slots in slot_sets:
        first_N = torch.tensor(
            [
                resident_frames[block] * shape.num_rows if block in resident_frames else slots[places[block]]
                for block in blocks
            ],
            dtype=torch.int32,
        )
        tables.append(first_N + first_L1 * step_N)
    return to_device(torch.stack(tables), device)


@dataclass(slots=True, kw_only=True)
class _Arrival:
    """One layer on its way into a slot set, or there; ``after`` are the fences that its copies wait for."""

    layer: int
    slot_set: int
    after: list[Fence] = field(default_factory=list)
    fences: list[Fence] = field(default_factory=list)
    pending: list[Future[Fence]] = field(default_factory=list)

    def settle(self) -> list[Fence]:
        """Wait until every copy is at least queued; the fences of all of them. One that failed does so each time."""
        while self.pending:
            try:
                self.fences.append(self.pending[-1].result())
            except CancelledError as error:
                raise StorageError("the cache was closed while a plan was being read") from error
            self.pending.pop()
        return self.fences

    def give_up(self) -> list[Fence]:
        """Cancel what has not begun; the fences after which the slots are free, whether or not all of it came."""
        for future in self.pending:
            future.cancel()
        for future in self.pending:
            if not future.cancelled() and future.exception() is None:
                self.fences.append(future.result())
        self.pending.clear()
        return [*self.after, *self.fences]  # copies that never began wait for nothing


class Ring:
    """Moves the streamed part of one plan. Belongs to the thread, and the stream, that reads."""

    def __init__(
        self,
        *,
        pages: Sequence[Tensor],
        slabs: Sequence[Tensor],
        lane: Lane,
        slot_sets: Sequence[Sequence[int]],
        runs: Sequence[HostRun],
        disk_blocks: Sequence[tuple[int, int]],
        read_page: PageReader,
        after: Sequence[Fence],
    ) -> None:
        """Queue the first layers.

        Args:
            pages: the device arena's [slots, H, P] by layer.
            slabs: the host pool's [F, H, P] by layer.
            lane: host -> device copies.
            slot_sets: arena slots [depth][K].
            runs: what comes from host frames.
            disk_blocks: (block, place) of what comes from the disk; its staging slot in set s is s * len + index.
            read_page: starts a disk read followed by a copy.
            after: fences that free the ring's slots and fill the host frames.
        """
        self._pages, self._slabs, self._lane = pages, slabs, lane
        self._slot_sets, self._runs, self._disk_blocks = slot_sets, runs, disk_blocks
        self._read_page = read_page
        self._num_layers = len(slabs)
        self._device = pages[0].device
        self._free: deque[tuple[int, list[Fence]]] = deque((index, list(after)) for index in range(len(slot_sets)))
        self._coming: deque[_Arrival] = deque()
        self._now: _Arrival | None = None
        self._fill(0)

    def turn_to(self, layer: int) -> int:
        """Make the current stream wait for a layer's pages and queue the copies of layers to come.

        Returns:
            The slot set that holds it.

        Raises:
            StorageError: a page could not be read from the disk.
        """
        if self._now is not None and self._now.layer == layer:
            return self._now.slot_set
        attended = mark(self._device)
        if self._now is not None:
            self._free.append((self._now.slot_set, [attended]))
            self._now = None
        while self._coming and self._coming[0].layer != layer:
            skipped = self._coming.popleft()
            self._free.append((skipped.slot_set, skipped.give_up()))
        if not self._coming:
            self._fill(layer)
        arrival = self._coming[0]
        for fence in arrival.settle():
            fence.wait()
        self._now = self._coming.popleft()
        last = self._coming[-1].layer if self._coming else layer
        self._fill((last + 1) % self._num_layers)
        return arrival.slot_set

    def stop(self) -> list[Fence]:
        """Let copies under way be; returns the fences after which the ring's slots are free."""
        fences = [fence for _, freed in self._free for fence in freed]
        for arrival in self._coming:
            fences += arrival.give_up()
        self._coming.clear()
        return fences

    def _fill(self, layer: int) -> None:
        while self._free and len(self._coming) < self._num_layers:
            slot_set, after = self._free.popleft()
            self._coming.append(self._start(layer, slot_set, after))
            layer = (layer + 1) % self._num_layers

    def _start(self, layer: int, slot_set: int, after: list[Fence]) -> _Arrival:
        slots = self._slot_sets[slot_set]
        arrival = _Arrival(layer=layer, slot_set=slot_set, after=after)
        if self._runs:
            pairs = []
            for run in self._runs:
                slot = slots[run.first_place]
                pairs.append(
                    (
                        self._pages[layer][slot : slot + run.num_blocks],
                        self._slabs[layer][run.first_frame : run.first_frame + run.num_blocks],
                    )
                )
            arrival.fences.append(self._lane.copy(pairs, after))
        for index, (block, place) in enumerate(self._disk_blocks):
            staging = slot_set * len(self._disk_blocks) + index
            arrival.pending.append(self._read_page(block, layer, staging, after, slots[place]))
        return arrival
