"""Which block lies in which frame of one tier: bookkeeping without tensors."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from longtake.kernels.errors import CapacityError


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

    @property
    def num_pinned(self) -> int:
        """Blocks with at least one pin."""
        return len(self._pins)

    def unpinned(self) -> list[int]:
        """Blocks whose frame may be freed, in ascending order."""
        return sorted(block for block in self._frame_of if block not in self._pins)
