"""The device tier: the arena's frames, filled by commits and from the host tier, emptied by Belady's choice."""

from __future__ import annotations

from collections.abc import Collection

from longtake.offload.arena import DeviceArena
from longtake.offload.belady import Uses
from longtake.offload.frames import Tier
from longtake.offload.hosttier import HostTier
from longtake.offload.lanes import Fence, Lane


class DeviceTier:
    """Frames of the arena. Every method is called with the cache's lock held."""

    def __init__(self, *, arena: DeviceArena, host: HostTier | None, uses: Uses) -> None:
        self.arena, self.host = arena, host
        self.table = Tier(arena.num_frames, tier="device")
        self.lane = Lane(arena.device)
        self._uses = uses

    def _may_leave(self, block: int, protect: Collection[int], beyond: float | None) -> bool:
        if block in protect or block < 0:
            return False
        if beyond is not None and self._uses.distance(block) <= beyond:
            return False
        return not self._uses.needed(block) or (self.host is not None and self.host.keeps(block))

    def num_available(self, beyond: float | None = None) -> int:
        """Frames that are free or could be made so; `beyond` as in make_room."""
        return self.table.num_free + sum(self._may_leave(block, (), beyond) for block in self.table.unpinned())

    def make_room(self, protect: Collection[int] = (), beyond: float | None = None) -> bool:
        """See to it that a frame is free, if need be by evicting the block read last.

        Args:
            protect: blocks that must stay.
            beyond: evict only blocks that are read later than this distance; None: any.
        """
        if self.table.num_free:
            return True
        victim = self._uses.farthest(self.table.unpinned(), lambda block: self._may_leave(block, protect, beyond))
        if victim is None:
            return False
        self.table.evict(victim)
        return True

    def lift(self, block: int) -> None:
        """Queue a block's copy from its host frame into a free frame."""
        assert self.host is not None
        frame, after = self.table.admit(block)
        source, target = self.host.pages(block), self.arena.frame(frame)
        arrived = self.lane.copy(zip(target, source, strict=True), [*after, self.host.table.filled(block)])
        self.table.fill(block, arrived)
        self.host.table.use(block, arrived)

    def take_ring(
        self, names: Collection[int], protect: Collection[int], pins: list[tuple[Tier, int]]
    ) -> tuple[list[int], list[Fence]]:
        """Take and pin frames for a ring, under negative names.

        Returns:
            Their slots, in order, and the fences that free them.
        """
        frames, fences = [], []
        for name in names:
            if not self.make_room(protect):
                raise AssertionError("a ring was promised more frames than can be freed")
            frame, after = self.table.admit(name)
            self.table.pin(name)
            pins.append((self.table, name))
            frames.append(frame)
            fences += after
        return [slot for frame in sorted(frames) for slot in self.arena.ring_slots(frame)], fences
