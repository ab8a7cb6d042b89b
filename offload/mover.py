"""Brings plans onto the device: what fits is moved once, the rest is streamed; what comes next is moved ahead of time.

Legend: G slots, L layers, H heads of this rank, P payload bytes, N blocks of a plan, K streamed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from longtake.kernels.errors import CapacityError
from longtake.offload.arena import slot_tables_LN
from longtake.offload.belady import Split, Uses, split
from longtake.offload.devicetier import DeviceTier
from longtake.offload.frames import Tier
from longtake.offload.hosttier import HostTier
from longtake.offload.lanes import Fence
from longtake.offload.streaming import Ring, host_runs, ring_tables


@dataclass(slots=True, kw_only=True)
class Placed:
    """A plan on the device: its slots, its ring, and the pins that keep both.

    Args:
        tables_DLN: see `Reading`.
        ring: None when all is resident.
        pins: (tier, block or name) pinned once each.
    """

    tables_DLN: Tensor
    ring: Ring | None
    pins: list[tuple[Tier, int]] = field(default_factory=list)


class Mover:
    """Moves blocks between the tiers of one cache. Every method is called with the cache's lock held."""

    def __init__(self, *, device: DeviceTier, host: HostTier | None, uses: Uses) -> None:
        self._device, self._host, self._uses = device, host, uses
        self._shape = device.arena.shape
        self._next_name = -1
        self.num_hits = self.num_misses = 0

    def place(self, blocks: tuple[int, ...], *, reserve: int) -> Placed:
        """Make a plan's blocks readable and pin them.

        Args:
            blocks: that some tier keeps, in reading order.
            reserve: device frames to leave for a commit.

        Raises:
            CapacityError: the tiers together are too small.
            StorageError: a block cannot be read. Either way nothing stays pinned.
        """
        wanted = tuple(dict.fromkeys(blocks))
        chosen = self._split(wanted, reserve)
        self._count(wanted)
        pins: list[tuple[Tier, int]] = []
        try:
            self._make_resident(chosen.resident, pins)
            if chosen.streamed:
                return self._stream(blocks, chosen, pins)
        except BaseException:
            self.let_go(pins, [])
            raise
        finally:
            self._uses.fetching(())
        table = self._device.table
        for block in wanted:
            table.filled(block).wait()
        frames = [table.frame(block) for block in blocks]
        tables_LN = slot_tables_LN(frames, shape=self._shape, device=self._device.arena.device)
        return Placed(tables_DLN=tables_LN[None], ring=None, pins=pins)

    def let_go(self, pins: list[tuple[Tier, int]], fences: Sequence[Fence]) -> None:
        """Undo pins; the frames may be written again after the fences."""
        for table, block in pins:
            for fence in fences:
                table.use(block, fence)
            table.unpin(block)
            if block < 0:
                table.evict(block)
        pins.clear()

    def run_ahead(self, num_committed: int, *, reserve: int) -> None:
        """Start what announced plans will need, nearest first, in room that nothing nearer needs.

        A plan that will not fit the device is brought to the host only; its reading chooses what stays.
        """
        host, device = self._host, self._device
        if host is None:
            return
        for when, plan in enumerate(self._uses.plans):
            fits = len(frozenset(plan)) + 1 <= device.table.num_frames
            for block in plan:
                if block in device.table or not 0 <= block < num_committed:
                    continue
                if not host.holds(block):
                    if not host.arriving(block) and not host.fetch(block, float(when), float(when)):
                        return
                elif fits and device.num_available(float(when)) > reserve and device.make_room((), float(when)):
                    device.lift(block)

    def _count(self, wanted: Sequence[int]) -> None:
        """Note which of a plan's blocks need no disk any more."""
        device, host = self._device.table, self._host
        hits = sum(block in device or (host is not None and host.holds(block)) for block in wanted)
        self.num_hits += hits
        self.num_misses += len(wanted) - hits

    def _split(self, wanted: tuple[int, ...], reserve: int) -> Split:
        """Resident and streamed part of a plan, in what other readings leave."""
        table, host = self._device.table, self._host
        num_frames = table.num_frames - (table.num_pinned - sum(table.pinned(block) for block in wanted))
        needed_bytes = (len(wanted) + 1) * self._shape.block_bytes
        if host is None:
            if len(wanted) > num_frames:
                raise CapacityError(
                    f"a plan of {len(wanted)} blocks does not fit a device arena of {table.num_frames}; raise the "
                    f"cache's device budget to {needed_bytes:,} bytes or add a host budget"
                )
            return Split(resident=wanted, streamed=(), ring_frames=0, depth=0)
        try:
            return split(
                wanted,
                num_frames=num_frames - reserve,
                pages_a_frame=self._shape.pages_a_frame,
                on_device=frozenset(table),
                uses=self._uses,
            )
        except CapacityError as error:
            raise CapacityError(
                f"{error}; raise the cache's device budget ({needed_bytes:,} bytes hold the whole plan) or attend less"
            ) from error

    def _make_resident(self, resident: Sequence[int], pins: list[tuple[Tier, int]]) -> None:
        """Bring blocks onto the device and pin them; disk reads run as far ahead as host frames allow."""
        device, host, protect = self._device, self._host, frozenset(resident)

        def pin(block: int) -> None:
            device.table.pin(block)
            pins.append((device.table, block))

        missing = [block for block in resident if block not in device.table]
        for block in resident:
            if block in device.table:
                pin(block)
        if not missing:
            return
        assert host is not None
        missing.sort(key=lambda block: not host.holds(block))
        for done, block in enumerate(missing):
            self._demand(host, block, missing[done:])
            try:
                if block not in device.table:  # an announced plan may have brought it up meanwhile
                    if not device.make_room(protect):
                        raise AssertionError("a plan was promised more frames than can be freed")
                    device.lift(block)
                pin(block)
            finally:
                host.table.unpin(block)

    def _demand(self, host: HostTier, block: int, missing: Sequence[int]) -> None:
        """Bring a block to the host and pin it there; the reads of the missing ones after it start as well."""
        if not host.holds(block):  # else nothing is to be fetched, and a long history is walked in linear time
            self._uses.fetching(missing)
            for ahead in missing:
                if not host.fetch(ahead, 0.0, -1.0):
                    break
        host.demand(block)

    def _stream(self, blocks: tuple[int, ...], chosen: Split, pins: list[tuple[Tier, int]]) -> Placed:
        """Place a plan with a ring: hold what host frames can, leave the rest to the disk."""
        host, device = self._host, self._device
        assert host is not None
        durable = host.durable_blocks
        streamed = sorted(chosen.streamed, key=lambda block: (block < durable, not host.holds(block), block))
        num_disk, num_staging = host.share(len(streamed), depth=chosen.depth)
        held, from_disk = streamed[: len(streamed) - num_disk], streamed[len(streamed) - num_disk :]
        for done, block in enumerate(held):
            self._demand(host, block, held[done:])
            pins.append((host.table, block))
        for block in from_disk:
            host.await_durable(block)
        staging, staging_free = host.take_staging(self._names(num_staging), pins)
        slots, after = device.take_ring(self._names(chosen.ring_frames), frozenset(chosen.resident), pins)
        held.sort(key=host.table.frame)
        order = [*held, *from_disk]
        slot_sets = [slots[first : first + len(order)] for first in range(0, len(order) * chosen.depth, len(order))]
        for block in chosen.resident:
            device.table.filled(block).wait()
        tables_DLN = ring_tables(
            blocks,
            {block: device.table.frame(block) for block in chosen.resident},
            {block: place for place, block in enumerate(order)},
            slot_sets,
            self._shape,
            device.arena.device,
        )
        ring = Ring(
            pages=device.arena.pages,
            slabs=host.pool.slabs,
            lane=device.lane,
            slot_sets=slot_sets,
            runs=host_runs([host.table.frame(block) for block in held], slot_sets),
            disk_blocks=[(block, len(held) + index) for index, block in enumerate(from_disk)],
            read_page=self._page_reader(staging, staging_free),
            after=[*after, *(host.table.filled(block) for block in held)],
        )
        return Placed(tables_DLN=tables_DLN, ring=ring, pins=pins)

    def _page_reader(
        self, staging: list[Tensor], free: list[Fence]
    ) -> Callable[[int, int, int, Sequence[Fence], int], Future[Fence]]:
        """What a ring calls for a page that only the disk has: disk -> staging page -> ring slot."""
        host, device = self._host, self._device
        assert host is not None
        busy = [list(free) for _ in staging]

        def read_page(block: int, layer: int, place: int, ring_free: Sequence[Fence], slot: int) -> Future[Fence]:
            def job() -> Fence:
                for fence in busy[place]:
                    fence.synchronize()
                target_HP = device.arena.pages[layer][slot]
                page_HP = staging[place].view(-1)[: target_HP.numel()].view(target_HP.shape)
                host.read_page(block, layer, page_HP.numpy())
                copied = device.lane.copy([(target_HP, page_HP)], ring_free)
                busy[place] = [copied]
                return copied

            return host.submit(job)

        return read_page

    def _names(self, count: int) -> list[int]:
        """Names for frames that hold no block: negative numbers, never used twice."""
        self._next_name -= count
        return [self._next_name + index + 1 for index in range(count)]
