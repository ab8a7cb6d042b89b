"""The cache of a shot's history: what a rollout reads, and where it commits.

    with cache.prepare(plan.blocks) as reading:          # blocks of the plan, readable on the device
        cache.schedule(plans to come)                    # optional: lets copies run ahead
        ... reading.pages(layer) ...                     # every step, and the commit pass
        commit = cache.begin_commit(plan.block)
        ... codec.encode(..., commit.page(layer)) ...    # the commit pass, layer by layer
        commit.complete()
    cache.retain(needed_later)

    device arena  --copy stream-->  host pool  --writer threads-->  Zarr, then the journal
                  <--copy stream--             <--reader threads--

Legend: G slots, L layers, H heads of this rank, P payload bytes, N blocks of a plan, K streamed ones.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterable, Sequence

import torch

from longtake.kernels.errors import CapacityError, ConfigError, StorageError
from longtake.offload.arena import DeviceArena
from longtake.offload.belady import Uses
from longtake.offload.budget import CacheBudget
from longtake.offload.cachestats import CacheStats, TierUse
from longtake.offload.devicetier import DeviceTier
from longtake.offload.errors import DiskFullError
from longtake.offload.host import HostPool
from longtake.offload.hosttier import HostTier
from longtake.offload.lanes import Fence, mark
from longtake.offload.mover import Mover, Placed
from longtake.offload.reading import Commit, Reading
from longtake.offload.run import RunDirectory
from longtake.offload.shape import ModelKVShape
from longtake.offload.spill import Step
from longtake.offload.store import Payloads

__all__ = ["CacheBudget", "CacheStats", "Commit", "KVCache", "Reading", "TierUse"]


class KVCache:
    """The encoded history of one shot on one rank.

    Calls come from one thread, and on CUDA work of one stream. A call that raises has changed nothing. What a write in
    the background runs into is raised by the next `prepare`, `begin_commit` or `flush`, never in the middle of a block.
    """

    def __init__(
        self,
        *,
        shape: ModelKVShape,
        device: torch.device | str,
        budget: CacheBudget,
        run: RunDirectory | None = None,
        num_writers: int = 4,
        num_readers: int = 4,
        on_step: Step | None = None,
    ) -> None:
        """Allocate the tiers and start their threads.

        Args:
            shape: geometry of a block on this rank.
            device: where attention reads.
            budget: how much to take.
            run: the disk tier; its committed blocks are this cache's history. Stays the caller's to close, after this.
            num_writers, num_readers: threads for chunks.
            on_step: called at each step of a commit, by name; for tests that kill the process there.
        """
        self.shape, self.device, self.budget = shape, torch.device(device), budget
        self.arena = DeviceArena(shape=shape, num_frames=budget.num_frames(shape), device=self.device)
        self._lock = threading.Condition(threading.RLock())
        self._uses = Uses()
        self._host: HostTier | None = None
        num_host_frames = budget.num_host_frames(shape, disk=run is not None)
        if num_host_frames:
            self._host = HostTier(
                pool=HostPool(shape=shape, num_frames=num_host_frames, device=self.device),
                run=run,
                uses=self._uses,
                lock=self._lock,
                num_writers=num_writers,
                num_readers=num_readers,
                on_arrival=self._run_ahead,
                on_step=on_step,
            )
        self._device = DeviceTier(arena=self.arena, host=self._host, uses=self._uses)
        self._mover = Mover(device=self._device, host=self._host, uses=self._uses)
        self._run = run
        self._num_committed = 0 if run is None else run.num_blocks
        self._open_commit: Commit | None = None
        self._table_bytes = 0
        self._closed = False

    # -- what is there

    @property
    def num_committed(self) -> int:
        """Blocks committed so far; the next commit is of this number."""
        return self._num_committed

    @property
    def durable_blocks(self) -> int:
        """Blocks from 0 on that would survive the process; 0 without a disk."""
        return 0 if self._run is None else self._run.num_blocks

    def claim_summaries(self) -> list[Payloads]:
        """What `Commit.attach` was given for the blocks that were durable on opening, [H, any] each; only once."""
        return [] if self._run is None else self._run.claim_summaries()

    def memory(self) -> dict[str, int]:
        """Every byte that the cache holds, by name."""
        held = {"device_arena": self.arena.nbytes, "device_slot_tables": self._table_bytes}
        if self._host is not None:
            held["host_pool"] = self._host.pool.nbytes
        if self._run is not None:
            held["host_checksums"] = self._run.checksum_bytes
            held["host_disk_buffers"] = self._run.buffer_bytes
        return held

    def stats(self) -> CacheStats:
        """Counters so far."""
        with self._lock:
            hits, misses = self._mover.num_hits, self._mover.num_misses
            if self._host is None:
                return CacheStats(num_hits=hits, num_misses=misses)
            counted = self._host.counters
            return CacheStats(
                num_hits=hits,
                num_misses=misses,
                written_bytes=counted.num_written * self.shape.block_bytes,
                read_bytes=counted.read_bytes,
                stalled_host_s=counted.stalled_write_s,
                stalled_disk_s=counted.stalled_read_s,
                up_bytes=self._device.lane.num_bytes,
                down_bytes=self._host.down_bytes,
                num_written=counted.num_written,
                num_read=counted.num_read,
                last_lag_s=counted.last_lag_s,
                max_lag_s=counted.max_lag_s,
            )

    def tiers(self) -> dict[str, TierUse]:
        """How full each tier is, by name."""
        size = self.shape.block_bytes
        with self._lock:
            held = sum(block >= 0 for block in self._device.table)
            found = {"device": TierUse(used_bytes=held * size, budget_bytes=self.arena.nbytes)}
            if self._host is not None:
                held = sum(block >= 0 for block in self._host.table)
                found["host"] = TierUse(used_bytes=held * size, budget_bytes=self._host.table.num_frames * size)
            if self._run is not None:
                found["disk"] = TierUse(used_bytes=self._run.num_kept * size, budget_bytes=self.budget.disk_bytes)
            return found

    # -- reading

    def prepare(self, blocks: Sequence[int]) -> Reading:
        """Make blocks readable on the device; waits only for the disk.

        What fits beside the block to be committed is moved once; of a larger plan a part stays, the rest is streamed.

        Args:
            blocks: committed blocks, in the order in which `Reading.pages` is to list them.

        Raises:
            ConfigError: a block was never committed.
            CapacityError: the tiers together are too small, or a block left memory and no tier below keeps it.
            StorageError: a block cannot be read from the disk or was dropped from it, or an earlier one could not be
                written.
        """
        with self._lock:
            self._check(blocks)
            placed = self._mover.place(tuple(blocks), reserve=self._reserve)
            reading = Reading(
                blocks=tuple(blocks),
                pages=self.arena.pages,
                tables_DLN=placed.tables_DLN,
                ring=placed.ring,
                on_release=lambda fences: self._release(reading, placed, fences),
            )
            self._table_bytes += reading.table_bytes
            self._uses.prepared(blocks)
            self._run_ahead()
            return reading

    def schedule(self, plans: Iterable[Sequence[int]]) -> None:
        """Announce the plans that will be prepared next, in order; replaces what was announced before.

        Blocks of the nearest plans are read from the disk and copied to the device ahead of time, where there is room
        that no nearer plan needs; eviction follows the same order.
        """
        with self._lock:
            self._uses.announce(plans)
            self._run_ahead()

    def retain(self, blocks: Collection[int]) -> None:
        """Tell which blocks any future plan may read; the others may leave memory, though never the disk.

        Args:
            blocks: of the history; later commits are always retained until the next call.
        """
        with self._lock:
            self._uses.retain(blocks, self._num_committed)
            self._drop_unneeded()
            self._lock.notify_all()

    def drop(self, blocks: Collection[int]) -> None:
        """Delete durable blocks from the disk: no plan to come may read them, from wherever the shot goes on.

        Args:
            blocks: those that are dropped already do not matter.

        Raises:
            StorageError, DiskFullError: see `RunDirectory.drop`.
        """
        if self._run is not None:
            self._run.drop(blocks)

    @property
    def disk_room_blocks(self) -> float:
        """How many more blocks the disk's budget holds, without those that are dropped meanwhile."""
        most = self.budget.disk_bytes
        if self._run is None or most is None:
            return math.inf
        num_dropped = self._run.num_blocks - self._run.num_kept
        return most // self.shape.block_bytes - (self._num_committed - num_dropped)

    # -- committing

    def begin_commit(self, block: int) -> Commit:
        """Open the next block for writing; waits while the host tier is full of blocks on their way to the disk.

        Args:
            block: its number, `num_committed`.

        Raises:
            ConfigError: another number, or another commit is open.
            CapacityError: no frame is free and none may be freed; DiskFullError: the disk, or its budget, is full.
            StorageError: an earlier block could not be written.
        """
        with self._lock:
            self._check(())
            if self._open_commit is not None:
                raise ConfigError(f"block {self._open_commit.block} is still being committed; complete or abort it")
            if block != self._num_committed:
                raise ConfigError(f"commits come in order: block {self._num_committed} is next, not {block}")
            self._check_disk_budget(block)
            if self._host is not None:
                self._host.reserve(block)
            if not self._device.make_room():
                if self._host is not None:
                    self._host.cancel(block)
                raise self._arena_full(block)
            frame, after = self._device.table.admit(block)
            self._device.table.pin(block)
            for fence in after:
                fence.wait()
            self._open_commit = Commit(
                block=block,
                pages=self.arena.frame(frame),
                on_complete=self._complete,
                on_abort=self._abort,
            )
            return self._open_commit

    def flush(self) -> None:
        """Wait until every committed block is durable; returns at once without a disk.

        Raises:
            DiskFullError, StorageError: a block could not be written; those before it are durable.
        """
        with self._lock:
            while self._host is not None:
                self._host.check()
                if self._host.idle:
                    return
                self._lock.wait()

    def close(self, *, drain: bool = True) -> None:
        """Stop the threads and unpin the host pool; the cache can't be used after. A second call does nothing.

        Args:
            drain: first make all that was committed durable, if the disk allows; errors are `flush`'s to raise.
        """
        if self._closed or self._host is None:
            self._closed = True
            return
        self._closed = True
        if self._open_commit is not None:
            self._open_commit.abort()
        self._host.close(drain=drain, copies=[self._device.lane])

    # -- prepare, in parts

    def _check(self, blocks: Iterable[int]) -> None:
        if self._closed:
            raise ConfigError("the cache was closed")
        if self._host is not None:
            self._host.check()
        for block in blocks:
            if not 0 <= block < self._num_committed:
                raise ConfigError(f"block {block} is not committed; the history has {self._num_committed} blocks")
            if self._run is not None and block < self._run.num_blocks and not self._run.keeps(block):
                raise StorageError(
                    "this block was deleted from the disk when none to come could read it; render the shot anew with "
                    "--fresh",
                    block=block,
                )
            if block not in self._device.table and (self._host is None or not self._host.keeps(block)):
                raise CapacityError(f"block {block} left the device and there is no host or disk tier that keeps it")

    # -- the ends of what was handed out

    @property
    def _reserve(self) -> int:
        """Device frames to leave for the next commit."""
        return int(self._open_commit is None)

    def _run_ahead(self) -> None:
        if not self._closed:
            self._mover.run_ahead(self._num_committed, reserve=self._reserve)

    def _release(self, reading: Reading, placed: Placed, fences: list[Fence]) -> None:
        with self._lock:
            self._table_bytes -= reading.table_bytes
            self._mover.let_go(placed.pins, [mark(self.device), *fences])
            self._drop_unneeded()
            self._run_ahead()
            self._lock.notify_all()

    def _complete(self) -> None:
        with self._lock:
            assert self._open_commit is not None
            block, table = self._open_commit.block, self._device.table
            encoded = mark(self.device)
            table.fill(block, encoded)
            if self._host is not None:
                pages = self.arena.frame(table.frame(block))
                table.use(block, self._host.stage(block, pages, encoded, self._open_commit.summary_HS))
            table.unpin(block)
            self._open_commit = None
            self._num_committed += 1
            self._run_ahead()

    def _abort(self) -> None:
        with self._lock:
            assert self._open_commit is not None
            block, table = self._open_commit.block, self._device.table
            table.use(block, mark(self.device))
            table.unpin(block)
            table.evict(block)
            if self._host is not None:
                self._host.cancel(block)
            self._open_commit = None

    def _drop_unneeded(self) -> None:
        for tier in (self._device, self._host):
            if tier is not None:
                for block in tier.table.unpinned():
                    if not self._uses.needed(block):
                        tier.table.evict(block)

    def _check_disk_budget(self, block: int) -> None:
        if self.disk_room_blocks < 1:
            size, most = self.shape.block_bytes, self.budget.disk_bytes
            num_held = 0 if self._run is None else self._run.num_kept
            raise DiskFullError(
                f"the disk budget of {most:,} bytes is full: {num_held} blocks of {size:,} bytes; raise the cache's "
                f'disk budget, or let it keep only what is needed (keep = "needed"), and run again',
                block=block,
            )

    def _arena_full(self, block: int) -> CapacityError:
        frames, size = self.arena.num_frames, self.shape.block_bytes
        return CapacityError(
            f"the device arena is full: {frames} blocks of {size:,} bytes, all of them history that may be read again; "
            f"block {block} needs one more. Raise the cache's device budget to {(frames + 1) * size:,} bytes, add a "
            f"host budget, or attend fewer blocks (retain)"
        )
