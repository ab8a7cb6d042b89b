"""The host tier and the disk below it: frames for blocks on their way down, on their way up, and kept.

Three users share the frames and none can starve another:
- writes: at most all but `read_reserve` frames hold blocks that are not durable yet;
- readings: at most all but `write_reserve` frames are held by plans that are being read;
- disk reads hold a frame only until they have arrived.
So a write waits only for other writes, a read only for a frame that a write cannot take, and both end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from longtake.kernels.errors import CapacityError, LongtakeError, StorageError
from longtake.offload.belady import Uses
from longtake.offload.cachestats import HostCounters
from longtake.offload.frames import Tier
from longtake.offload.host import HostPool
from longtake.offload.lanes import Fence, Lane, thread_start
from longtake.offload.layout import Chunk
from longtake.offload.readers import Readers, when_all
from longtake.offload.run import RunDirectory
from longtake.offload.spill import Spiller, Step
from longtake.offload.store import Payloads

DEMANDED = -1.0


class HostTier:
    """Host frames, and the disk if there is one. Every method is called with `lock` held; workers take it to report."""

    def __init__(
        self,
        *,
        pool: HostPool,
        run: RunDirectory | None,
        uses: Uses,
        lock: threading.Condition,
        num_writers: int,
        num_readers: int,
        on_arrival: Callable[[], None],
        on_step: Step | None,
    ) -> None:
        """Start the workers.

        Args:
            pool: the frames' bytes; at least two with a disk.
            run: the disk; None: blocks stay here while they are needed.
            uses: who is read next.
            lock: the cache's; waiting on it lets the workers report.
            num_writers, num_readers: threads for chunks.
            on_arrival: called, lock held, when a disk read has ended.
            on_step: see Spiller.
        """
        self.pool, self.run, self.table = pool, run, Tier(pool.num_frames, tier="host")
        self.counters = HostCounters()
        reserve = 2 if run is not None and pool.num_frames >= 6 else 1
        self.write_reserve = reserve
        self.read_reserve = reserve if run is not None else 0
        self._uses, self._lock, self._on_arrival = uses, lock, on_arrival
        self._writing: dict[int, float] = {}
        self._arriving: set[int] = set()
        self._unreadable: dict[int, BaseException] = {}
        self._failure: BaseException | None = None
        self._reserved_after: list[Fence] = []
        self._down = Lane(pool.device)
        self._spiller: Spiller | None = None
        self._readers: Readers | None = None
        if run is not None:
            on_start = thread_start(pool.device)
            self._spiller = Spiller(
                run,
                num_threads=num_writers,
                on_durable=self._durable,
                on_failure=self._failed,
                on_step=on_step,
                on_start=on_start,
            )
            self._readers = Readers(num_readers, on_start)

    # -- what is where

    @property
    def durable_blocks(self) -> int:
        """Blocks from 0 on that the disk has."""
        return 0 if self.run is None else self.run.num_blocks

    def holds(self, block: int) -> bool:
        """Whether the block can be copied from here now."""
        return block in self.table and block not in self._arriving and block not in self._unreadable

    def arriving(self, block: int) -> bool:
        """Whether a disk read of the block is under way."""
        return block in self._arriving

    def keeps(self, block: int) -> bool:
        """Whether the block would survive leaving the device."""
        return self.holds(block) or (self.run is not None and self.run.keeps(block))

    def pages(self, block: int) -> list[Tensor]:
        """A held block's pages by layer."""
        return self.pool.pages(self.table.frame(block))

    # -- writing

    def check(self) -> None:
        """Raise what a worker ran into."""
        if isinstance(self._failure, LongtakeError):
            raise self._failure
        if self._failure is not None:
            raise StorageError(f"writing a block to the disk failed: {self._failure!r}") from self._failure

    def reserve(self, block: int) -> None:
        """Take a frame for a block that is about to be committed; waits for writes while there is none.

        Raises:
            CapacityError: nothing that is under way can free one.
            LongtakeError: a write failed.
        """
        began = time.perf_counter()
        while True:
            self.check()
            if len(self._writing) < self.table.num_frames - self.read_reserve and self.make_room():
                break
            if not self._writing and not self._arriving:
                raise CapacityError(
                    f"the host tier is full: {self.table.num_frames} blocks of {self.pool.shape.block_bytes:,} bytes, "
                    f"all of them history that may be read again; block {block} needs one more. Raise the cache's "
                    f"host budget or attend fewer blocks"
                )
            self._lock.wait()
        self.counters.stalled_write_s += time.perf_counter() - began
        _, self._reserved_after = self.table.admit(block)
        self.table.pin(block)

    def cancel(self, block: int) -> None:
        """Give back a reserved frame."""
        self.table.unpin(block)
        self.table.evict(block)

    def stage(self, block: int, pages: Sequence[Tensor], encoded: Fence, summary_HS: Tensor | None = None) -> Fence:
        """Copy a committed block down into its reserved frame and on to the disk.

        Args:
            pages: by layer, on the device.
            encoded: passed when the pages are filled.
            summary_HS: uint8 on the device, filled as well, to be journaled with the block; must stay as it is.

        Returns:
            A fence after which the device's pages may be overwritten.
        """
        pairs = list(zip(self.pages(block), pages, strict=True))
        summary: Payloads | None = None
        if summary_HS is not None and self.run is not None:
            kept_HS = torch.empty(summary_HS.shape, dtype=torch.uint8, pin_memory=summary_HS.is_cuda)
            pairs.append((kept_HS, summary_HS))
            summary = kept_HS.numpy()
        staged = self._down.copy(pairs, [encoded, *self._reserved_after])
        self.table.fill(block, staged)
        if self._spiller is None or self.run is None:
            self.table.unpin(block)
        else:
            self._writing[block] = time.perf_counter()
            self._spiller.submit(block, self.pool.payloads(self.table.frame(block)), staged, summary)
        return staged

    def _durable(self, block: int) -> None:
        with self._lock:
            lag_s = time.perf_counter() - self._writing.pop(block)
            self.counters.last_lag_s = lag_s
            self.counters.max_lag_s = max(self.counters.max_lag_s, lag_s)
            self.counters.num_written += 1
            self.table.unpin(block)
            if not self._uses.needed(block) and not self.table.pinned(block):
                self.table.evict(block)
            self._lock.notify_all()

    def _failed(self, error: BaseException) -> None:
        with self._lock:
            self._failure = error
            self._lock.notify_all()

    # -- reading

    def make_room(self, beyond: float | None = None) -> bool:
        """See to it that a frame is free, if need be by evicting the block read last.

        Args:
            beyond: evict only blocks that are read later than this distance; None: any.
        """
        if self.table.num_free:
            return True

        def may_leave(block: int) -> bool:
            if block < 0 or (block >= self.durable_blocks and self._uses.needed(block)):
                return False
            return beyond is None or self._uses.distance(block) > beyond

        victim = self._uses.farthest(self.table.unpinned(), may_leave)
        if victim is None:
            return False
        self.table.evict(victim)
        return True

    def fetch(self, block: int, deadline: float, beyond: float | None = None) -> bool:
        """Start reading a durable block from the disk unless it is here or on its way; false if no frame is to be had.

        Args:
            deadline: smaller ones are read first; what could not be read is tried again with DEMANDED only.
            beyond: see make_room.
        """
        if block in self.table:
            return True
        if deadline != DEMANDED and block in self._unreadable:
            return True  # only a plan that cannot do without it tries again
        if self.run is None or self._readers is None or not self.make_room(beyond):
            return False
        self._unreadable.pop(block, None)
        frame, after = self.table.admit(block)
        self.table.pin(block)
        self._arriving.add(block)
        store, payloads = self.run.store, self.pool.payloads(frame)
        checksums_RH = self.run.checksums_RH(block)

        def read(chunk: Chunk) -> None:
            for fence in after:
                fence.synchronize()
            store.read_chunk(block, chunk, payloads, checksums_RH)

        futures = [self._readers.submit(deadline, partial(read, chunk)) for chunk in store.chunks]
        when_all(futures, lambda error: self._arrived(block, error))
        return True

    def _arrived(self, block: int, error: BaseException | None) -> None:
        with self._lock:
            self._arriving.discard(block)
            self.counters.num_read += error is None
            self.counters.read_bytes += self.pool.shape.block_bytes if error is None else 0
            self.table.unpin(block)
            if error is not None:
                self._unreadable[block] = error
                if not self.table.pinned(block):
                    self.table.evict(block)
            self._lock.notify_all()
            self._on_arrival()

    def demand(self, block: int) -> None:
        """Bring a block here and pin it; waits for the disk.

        Raises:
            StorageError: it cannot be read.
            CapacityError: nothing that is under way can free a frame for it.
            LongtakeError: a write failed, and its block holds the last frames.
        """
        began = time.perf_counter()
        others_read = block in self._arriving
        self._bring(block)
        if others_read and block in self._unreadable:  # it may have begun in a worse moment, for a plan given up since
            self._let_go(block)
            self._bring(block)
        self.counters.stalled_read_s += time.perf_counter() - began
        if block in self._unreadable:
            self._let_go(block)
            raise self._unreadable[block]

    def _bring(self, block: int) -> None:
        """Pin a block's frame and wait until its read has ended, well or not."""
        while not self.fetch(block, DEMANDED):
            self._wait_for_frame(f"block {block}")
        self.table.pin(block)
        while block in self._arriving:
            self._lock.wait()

    def _let_go(self, block: int) -> None:
        """Undo the pin of a block that could not be read."""
        self.table.unpin(block)
        if not self.table.pinned(block):
            self.table.evict(block)

    def _wait_for_frame(self, wanted_for: str) -> None:
        """Wait for a worker to report; what is under way must be able to free a frame."""
        self.check()
        if not self._writing and not self._arriving:
            raise CapacityError(
                f"no host frame for {wanted_for}: plans that are being read hold all {self.table.num_frames}; raise "
                f"the cache's host budget"
            )
        self._lock.wait()

    def read_page(self, block: int, layer: int, out_HP: Payloads) -> None:
        """Read one layer of a durable block from the disk, in the calling thread; takes the lock when it is read."""
        assert self.run is not None
        self.run.store.read_page(block, layer, out_HP, self.run.checksums_RH(block))
        with self._lock:
            self.counters.read_bytes += out_HP.nbytes

    def await_durable(self, block: int) -> None:
        """Wait until the disk has a block.

        Raises:
            LongtakeError: a write failed.
        """
        while block >= self.durable_blocks:
            self.check()
            self._lock.wait()

    def submit(self, job: Callable[[], Fence]) -> Future[Fence]:
        """Queue a job for the reader threads, before all prefetches."""
        assert self._readers is not None
        return self._readers.submit(DEMANDED, job)

    def share(self, num_streamed: int, *, depth: int) -> tuple[int, int]:
        """How a streamed plan's blocks share the host frames.

        Args:
            num_streamed: blocks that the ring moves.
            depth: layers that the ring holds at once.

        Returns:
            How many come from the disk page by page because no frame can hold them, and the frames that staging their
            pages takes.

        Raises:
            CapacityError: too few frames even for staging, or no disk.
        """
        frames = self.table.num_frames - self.write_reserve - self.num_held
        for num_disk in range(num_streamed + 1):
            num_staging = -(-num_disk * depth // self.pool.shape.pages_a_frame)
            if num_streamed - num_disk + num_staging <= frames and (self.run is not None or not num_disk):
                return num_disk, num_staging
        raise CapacityError(
            f"{num_streamed} blocks are to be streamed through {max(frames, 0)} host frames; raise the cache's host "
            f"budget ({(num_streamed + self.write_reserve) * self.pool.shape.block_bytes:,} bytes hold them all)"
        )

    @property
    def num_held(self) -> int:
        """Frames that readings hold, beside the pins of blocks on their way down or up."""
        return sum(
            self.table.num_pins(block) > (block in self._writing) + (block in self._arriving) for block in self.table
        )

    def take_staging(self, names: Sequence[int], pins: list[tuple[Tier, int]]) -> tuple[list[Tensor], list[Fence]]:
        """Take and pin frames for pages on their way from the disk to a ring, under negative names.

        Returns:
            Their pages, uint8 [H, P] of the largest layer, and the fences that free them.
        """
        pages, fences = [], []
        for name in names:
            while not self.make_room():
                self._wait_for_frame(f"staging page reads of {len(names)} frames")
            frame, after = self.table.admit(name)
            self.table.pin(name)
            pins.append((self.table, name))
            fences += after
            pages += self.pool.staging_pages(frame)
        return pages, fences

    # -- the end

    @property
    def down_bytes(self) -> int:
        """Bytes copied device -> host."""
        return self._down.num_bytes

    @property
    def idle(self) -> bool:
        """Whether every staged block is durable."""
        return not self._writing

    def close(self, *, drain: bool, copies: Sequence[Lane]) -> None:
        """Stop the workers and give the pool back; called WITHOUT the lock.

        Args:
            drain: first make everything staged durable.
            copies: other lanes that read the pool.
        """
        if self._readers is not None:
            self._readers.close()
        if self._spiller is not None:
            if drain:
                self._spiller.close()
            else:
                self._spiller.abandon()
        for lane in (self._down, *copies):
            lane.synchronize()
        self.pool.close()
