"""The cache of a shot's history: what a rollout reads, and where it commits.

    with cache.prepare(plan.blocks) as reading:          # blocks of the plan, readable on the device
        ... reading.pages(layer) ...                     # every step, and the commit pass
        commit = cache.begin_commit(plan.block)
        ... codec.encode(..., commit.page(layer)) ...    # the commit pass, layer by layer
        commit.complete()
    cache.retain(needed_later)

Legend: G slots, L layers, H heads of this rank, P payload bytes, N blocks of a plan.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from longtake.kernels.errors import CapacityError, ConfigError
from longtake.offload.arena import DeviceArena, slot_tables_LN
from longtake.offload.frames import FrameTable
from longtake.offload.shape import ModelKVShape


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheBudget:
    """How much of each tier a cache may take.

    Args:
        device_bytes: most bytes of the device arena; None: as many as `num_blocks` needs.
        num_blocks: most history blocks that a plan reads at once; one more frame is added for the block being
            committed. None: `device_bytes` decides alone. With both, the smaller arena is made.
    """

    device_bytes: int | None = None
    num_blocks: int | None = None

    def num_frames(self, shape: ModelKVShape) -> int:
        """Blocks that the device arena holds, the one being committed included.

        Raises:
            ConfigError: neither bound is given.
            CapacityError: the budget is smaller than one block.
        """
        if self.device_bytes is None and self.num_blocks is None:
            raise ConfigError("a cache budget needs device_bytes, num_blocks or both")
        wanted = None if self.num_blocks is None else self.num_blocks + 1
        if self.device_bytes is None:
            assert wanted is not None
            return wanted
        fitting = self.device_bytes // shape.block_bytes
        if fitting < 1:
            raise CapacityError(
                f"a device budget of {self.device_bytes:,} bytes holds no block of {shape.block_bytes:,} bytes; "
                f"give the cache at least that much on the device"
            )
        return fitting if wanted is None else min(fitting, wanted)


class Reading:
    """Blocks of one plan, readable on the device until `release`; a context manager.

    Belongs to the thread and, on CUDA, to the stream that prepared it.
    """

    def __init__(self, cache: KVCache, blocks: tuple[int, ...], tables_LN: Tensor) -> None:
        self._cache = cache
        self._tables_LN = tables_LN
        self.blocks = blocks
        self.released = False

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """The payloads of one layer.

        Args:
            layer: 0 .. L-1.

        Returns:
            pages_GHP uint8 [G, H, P], the arena, and slots_N int32 [N] on the same device: the slots of the plan's
            blocks, in the plan's order. Not to be written.
        """
        if self.released:
            raise ConfigError("this reading was released; prepare the plan again")
        return self._cache.arena.pages_GHP, self._tables_LN[layer]

    def release(self) -> None:
        """Let the blocks go; a second call does nothing."""
        if not self.released:
            self.released = True
            self._cache._release(self)

    def __enter__(self) -> Reading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Commit:
    """The frame of a block that is being encoded; ends with `complete` or `abort`."""

    def __init__(self, cache: KVCache, block: int, pages_LHP: Tensor) -> None:
        self._cache = cache
        self._pages_LHP = pages_LHP
        self.block = block
        self.open = True

    def page(self, layer: int) -> Tensor:
        """Where one layer's payloads go: uint8 [H, P], contiguous, to be filled wholly on the current stream."""
        if not self.open:
            raise ConfigError(f"the commit of block {self.block} has ended")
        return self._pages_LHP[layer]

    def complete(self) -> None:
        """Make the block part of the history. Every page must be filled, or queued to be, on the current stream."""
        self._end()
        self._cache._complete(self)

    def abort(self) -> None:
        """Drop the block; the cache is as it was before `begin_commit`. Does nothing when the commit has ended."""
        if self.open:
            self._end()
            self._cache._abort(self)

    def _end(self) -> None:
        if not self.open:
            raise ConfigError(f"the commit of block {self.block} has ended")
        self.open = False


class KVCache:
    """The encoded history of one shot on one rank.

    Calls come from one thread. A call that raises has changed nothing.
    """

    def __init__(self, *, shape: ModelKVShape, device: torch.device | str, budget: CacheBudget) -> None:
        """Allocate the tiers.

        Args:
            shape: geometry of a block on this rank.
            device: where attention reads.
            budget: how much to take.
        """
        self.shape = shape
        self.device = torch.device(device)
        self.arena = DeviceArena(shape=shape, num_frames=budget.num_frames(shape), device=self.device)
        self._frames = FrameTable(self.arena.num_frames, tier="device")
        self._num_committed = 0
        self._open_commit: Commit | None = None
        self._retained: frozenset[int] | None = None
        self._retained_until = 0
        self._table_bytes = 0

    @property
    def num_committed(self) -> int:
        """Blocks committed so far; the next commit is of this number."""
        return self._num_committed

    def prepare(self, blocks: Sequence[int]) -> Reading:
        """Make blocks readable on the device.

        Args:
            blocks: committed blocks, in the order in which `Reading.pages` is to list them.

        Raises:
            ConfigError: a block was never committed.
            CapacityError: a block has left the device and no lower tier keeps it.
        """
        for block in blocks:
            if not 0 <= block < self._num_committed:
                raise ConfigError(f"block {block} is not committed; the history has {self._num_committed} blocks")
            if block not in self._frames:
                raise CapacityError(f"block {block} left the device and there is no host or disk tier that keeps it")
        frames = [self._frames.frame(block) for block in blocks]
        tables_LN = slot_tables_LN(frames, num_layers=self.shape.num_layers, device=self.device)
        for block in blocks:
            self._frames.pin(block)
        self._table_bytes += tables_LN.numel() * tables_LN.element_size()
        return Reading(self, tuple(blocks), tables_LN)

    def begin_commit(self, block: int) -> Commit:
        """Open the next block for writing.

        Args:
            block: its number, `num_committed`.

        Raises:
            ConfigError: another number, or another commit is open.
            CapacityError: no frame is free and none may be freed.
        """
        if self._open_commit is not None:
            raise ConfigError(f"block {self._open_commit.block} is still being committed; complete or abort it")
        if block != self._num_committed:
            raise ConfigError(f"commits come in order: block {self._num_committed} is next, not {block}")
        if not self._frames.num_free:
            raise CapacityError(
                f"the device arena is full: {self.arena.num_frames} blocks of {self.shape.block_bytes:,} bytes, "
                f"all of them history that may be read again; block {block} needs one more. Raise the cache's device "
                f"budget to {(self.arena.num_frames + 1) * self.shape.block_bytes:,} bytes, add a host budget, or "
                f"attend fewer blocks (retain)"
            )
        frame = self._frames.take(block)
        self._open_commit = Commit(self, block, self.arena.frame_LHP(frame))
        return self._open_commit

    def retain(self, blocks: Collection[int]) -> None:
        """Tell which blocks any future plan may read; with no lower tier the others are gone once nobody reads them.

        Args:
            blocks: of the history; later commits are always retained until the next call.
        """
        self._retained = frozenset(blocks)
        self._retained_until = self._num_committed
        self._drop_unneeded()

    def memory(self) -> dict[str, int]:
        """Every byte that the cache holds, by name."""
        return {"device_arena": self.arena.nbytes, "device_slot_tables": self._table_bytes}

    def _needed(self, block: int) -> bool:
        return self._retained is None or block >= self._retained_until or block in self._retained

    def _drop_unneeded(self) -> None:
        for block in self._frames.unpinned():
            if block < self._num_committed and not self._needed(block):
                self._frames.give(block)

    def _release(self, reading: Reading) -> None:
        for block in reading.blocks:
            self._frames.unpin(block)
        self._table_bytes -= reading._tables_LN.numel() * reading._tables_LN.element_size()
        self._drop_unneeded()

    def _complete(self, commit: Commit) -> None:
        self._open_commit = None
        self._num_committed += 1

    def _abort(self, commit: Commit) -> None:
        self._open_commit = None
        self._frames.give(commit.block)
