"""Which block lies in which frame of one tier, and when a frame may be written again: bookkeeping without bytes."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from longtake.kernels.errors import CapacityError
from longtake.offload.lanes import DONE, Fence


class FrameTable:
    """Frames of one tier: free, or held by one block; held ones may be pinned any number of times.

    Not thread-safe: its owner holds a lock.
    """

    def __init__(self, num_frames: int, *, tier: str) -> None:
        self.num_frames = num_frames
        self.tier = tier
        self._free = list(range(num_frames))
        self._frame_of: dict[int, int] = {}
        self._pins: dict[int, int] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._frame_of

    def __iter__(self) -> Iterator[int]:
        """The blocks that hold a frame."""
        return iter(tuple(self._frame_of))

    def __len__(self) -> int:
        return len(self._frame_of)

    @property
    def num_free(self) -> int:
        """Frames that no block holds."""
        return len(self._free)

    def frame(self, block: int) -> int:
        """The frame of a block that holds one."""
        return self._frame_of[block]

    def take(self, block: int) -> int:
        """Give a free frame, the lowest, to a block.

        Raises:
            CapacityError: none is free.
        """
        if block in self._frame_of:
            raise AssertionError(f"block {block} already holds a frame of the {self.tier} tier")
        if not self._free:
            raise CapacityError(f"no free frame in the {self.tier} tier for block {block}")
        frame = heapq.heappop(self._free)
        self._frame_of[block] = frame
        return frame

    def give(self, block: int) -> int:
        """Free a block's frame and return its number; the block must not be pinned."""
        if self._pins.get(block, 0):
            raise AssertionError(f"block {block} of the {self.tier} tier is pinned")
        frame = self._frame_of.pop(block)
        heapq.heappush(self._free, frame)
        return frame

    def pin(self, block: int) -> None:
        """Keep a block's frame from being freed until as many `unpin`."""
        if block not in self._frame_of:
            raise AssertionError(f"block {block} holds no frame of the {self.tier} tier")
        self._pins[block] = self._pins.get(block, 0) + 1

    def unpin(self, block: int) -> None:
        """Undo one `pin`."""
        left = self._pins[block] - 1
        if left:
            self._pins[block] = left
        else:
            del self._pins[block]

    def pinned(self, block: int) -> bool:
        """Whether someone reads or writes the block's frame."""
        return block in self._pins

    def num_pins(self, block: int) -> int:
        """How often the block is pinned."""
        return self._pins.get(block, 0)

    @property
    def num_pinned(self) -> int:
        """Blocks with at least one pin."""
        return len(self._pins)

    def unpinned(self) -> list[int]:
        """Blocks whose frame may be freed, in ascending order."""
        return sorted(block for block in self._frame_of if block not in self._pins)


class Tier(FrameTable):
    """A FrameTable that also knows the copies under way into and out of its frames."""

    def __init__(self, num_frames: int, *, tier: str) -> None:
        super().__init__(num_frames, tier=tier)
        self._filled: dict[int, Fence] = {}
        self._users: dict[int, list[Fence]] = {}

    def admit(self, block: int) -> tuple[int, list[Fence]]:
        """Give a free frame to a block.

        Returns:
            The frame, and the fences of its former users: whoever writes into it waits for them first.
        """
        frame = self.take(block)
        return frame, list(self._users.get(frame, ()))

    def fill(self, block: int, fence: Fence) -> None:
        """The block's bytes are in its frame once the fence is passed."""
        self._filled[block] = fence

    def filled(self, block: int) -> Fence:
        """What to wait for before reading the block's frame."""
        return self._filled.get(block, DONE)

    def use(self, block: int, fence: Fence) -> None:
        """The block's frame is read, or written, until the fence is passed."""
        if not fence.done():
            users = self._users.setdefault(self.frame(block), [])
            users[:] = [user for user in users if not user.done()]
            users.append(fence)

    def evict(self, block: int) -> None:
        """Free a block's frame; its bytes may still be on their way in or out."""
        self.use(block, self._filled.pop(block, DONE))
        self.give(block)
