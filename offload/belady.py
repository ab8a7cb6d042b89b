"""Who leaves a tier: the block whose next use is farthest (Belady 1966), from plans that are known. No tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from longtake.kernels.errors import CapacityError

MIN_DEPTH, MAX_DEPTH = 2, 4  # layers that a ring holds at once


class Uses:
    """When each block is read next: in which announced plan, or at some later time, or never."""

    def __init__(self) -> None:
        self._plans: tuple[tuple[int, ...], ...] = ()
        self._next: dict[int, int] = {}
        self._retained: frozenset[int] | None = None
        self._retained_until = 0
        self._now: frozenset[int] = frozenset()

    def fetching(self, blocks: Iterable[int]) -> None:
        """These blocks are being brought up this moment: nothing is nearer."""
        self._now = frozenset(blocks)

    def announce(self, plans: Iterable[Sequence[int]]) -> None:
        """Replace the announced plans; the first is the next one to be prepared."""
        self._plans = tuple(tuple(plan) for plan in plans)
        self._next = {}
        for when in reversed(range(len(self._plans))):
            for block in self._plans[when]:
                self._next[block] = when

    def prepared(self, blocks: Sequence[int]) -> None:
        """A plan was prepared: if it is the first announced, it has come."""
        if self._plans and self._plans[0] == tuple(blocks):
            self.announce(self._plans[1:])

    def retain(self, blocks: Collection[int], num_blocks: int) -> None:
        """From now on only these blocks of the first `num_blocks`, and later ones, may be read."""
        self._retained = frozenset(blocks)
        self._retained_until = num_blocks

    @property
    def plans(self) -> tuple[tuple[int, ...], ...]:
        """The announced plans, next first."""
        return self._plans

    def needed(self, block: int) -> bool:
        """Whether any future plan may read a block."""
        return (
            self._retained is None
            or block >= self._retained_until
            or block in self._retained
            or block in self._next
            or block in self._now
        )

    def distance(self, block: int) -> float:
        """Plans until a block is read.

        -1 if it is being brought up, 0 for the next plan, the number of announced plans if unannounced, infinite if
        never.
        """
        if block in self._now:
            return -1
        if block in self._next:
            return self._next[block]
        return len(self._plans) if self.needed(block) else math.inf

    def farthest(self, blocks: Iterable[int], may_leave: Callable[[int], bool]) -> int | None:
        """The block to evict: of those that may leave the one read last, and of equals the oldest."""
        return max(
            (block for block in blocks if may_leave(block)),
            key=lambda block: (self.distance(block), -block),
            default=None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a plan meets a device budget.

    Args:
        resident: blocks held whole on the device.
        streamed: blocks whose pages pass through the ring, layer by layer, every pass.
        ring_frames: frames that the ring takes.
        depth: layers that the ring holds at once.
    """

    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    ring_frames: int
    depth: int


def split(
    blocks: Sequence[int],
    *,
    num_frames: int,
    pages_a_frame: int,
    on_device: Collection[int],
    uses: Uses,
) -> Split:
    """Choose what of a plan stays on the device.

    Every layer of every pass reads every block once, so the access is cyclic: which blocks stay does not change how
    many pages must move, only keeping the same ones does (Belady; LRU would keep none). Those stay that the next plan
    reads too and that are there already.

    Args:
        blocks: of the plan, without repeats.
        num_frames: frames that may be used, the one for the block being committed not among them.
        pages_a_frame: pages of any layer that a frame holds.
        on_device: blocks that are on the device now.
        uses: to tell what later plans read.

    Raises:
        CapacityError: not even a ring fits.
    """
    if len(blocks) <= num_frames:
        return Split(resident=tuple(blocks), streamed=(), ring_frames=0, depth=0)
    best = sorted(blocks, key=lambda block: (uses.distance(block), block not in on_device, -block))
    for num_resident in reversed(range(num_frames + 1)):
        num_streamed = len(blocks) - num_resident
        ring_frames = -(-MIN_DEPTH * num_streamed // pages_a_frame)
        if num_resident + ring_frames <= num_frames:
            ring_frames = num_frames - num_resident
            depth = min(MAX_DEPTH, ring_frames * pages_a_frame // num_streamed)
            ring_frames = -(-depth * num_streamed // pages_a_frame)
            return Split(
                resident=tuple(best[:num_resident]),
                streamed=tuple(sorted(best[num_resident:])),
                ring_frames=ring_frames,
                depth=depth,
            )
    raise CapacityError(
        f"a plan of {len(blocks)} blocks cannot be streamed through {num_frames} device frames: a ring of {MIN_DEPTH} "
        f"layers needs {-(-MIN_DEPTH * len(blocks) // pages_a_frame)}"
    )
