"""Write-through: a block's pages in host memory become chunks on the disk, then one journal record.

    staged -> [writer threads: chunk, fsync] x chunks -> folder fsync -> journal record, fsync -> durable

Chunks of several blocks are written at once; records go in order of blocks, by one thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import numpy as np

from longtake.kernels.errors import StorageError
from longtake.offload.lanes import Fence
from longtake.offload.layout import Chunk
from longtake.offload.run import RunDirectory
from longtake.offload.store import Checksums, Pages, Payloads

Step = Callable[[str, int], None]
"""Called with the name of a step of a commit and the block when the step is over; for tests that kill the process."""

# Number, the writes of its chunks, summary.
_Block: TypeAlias = tuple[int, list[Future[Checksums]], Payloads | None]

STEPS = ("staged", "chunk", "chunks", "names", "journaled")


def _no_step(name: str, block: int) -> None:
    pass


class Spiller:
    """Writes blocks to a run directory in the background."""

    def __init__(
        self,
        run: RunDirectory,
        *,
        num_threads: int,
        on_durable: Callable[[int], None],
        on_failure: Callable[[BaseException], None],
        on_step: Step | None = None,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the threads.

        Args:
            run: where to write.
            num_threads: chunks written at once.
            on_durable: called with each block, in order, when its record is on the disk.
            on_failure: called once with the first error; nothing is journaled after it.
            on_step: see Step.
            on_start: called by each thread first.
        """
        self._run, self._on_start = run, on_start
        self._on_durable, self._on_failure = on_durable, on_failure
        self._step = on_step or _no_step
        self._failed = threading.Event()
        self._writers = ThreadPoolExecutor(num_threads, "longtake-write", on_start)
        self._blocks: queue.SimpleQueue[_Block | None] = queue.SimpleQueue()
        self._journaler = threading.Thread(target=self._journal, name="longtake-journal", daemon=True)
        self._journaler.start()

    def submit(self, block: int, pages: Pages, fence: Fence, summary_HS: Payloads | None = None) -> None:
        """Queue a block; its bytes must stay as they are until it is durable.

        Args:
            block: its number, one more than the last submitted.
            pages: in host memory, by layer.
            fence: passed when the bytes have arrived there.
            summary_HS: as well in host memory, to be journaled with the block.
        """
        futures = [self._writers.submit(self._write, block, chunk, pages, fence) for chunk in self._run.store.chunks]
        self._blocks.put((block, futures, summary_HS))

    def close(self) -> None:
        """Finish what was submitted and stop."""
        self._blocks.put(None)
        self._journaler.join()
        self._writers.shutdown(cancel_futures=True)

    def abandon(self) -> None:
        """Stop as soon as the chunks now being written are; the blocks that are not journaled are lost."""
        self._failed.set()
        self.close()

    def _write(self, block: int, chunk: Chunk, pages: Pages, fence: Fence) -> Checksums:
        fence.synchronize()
        if self._failed.is_set():
            raise StorageError("not written, because an earlier block could not be", block=block)
        self._step("staged", block)
        checksums_rh = self._run.store.write_chunk(block, chunk, pages)
        self._step("chunk", block)
        return checksums_rh

    def _journal(self) -> None:
        self._on_start()
        while (item := self._blocks.get()) is not None:
            block, futures, summary_HS = item
            try:
                self._make_durable(block, futures, summary_HS)
            except Exception as error:  # handed to the thread that commits, which raises it
                if not self._failed.is_set():
                    self._failed.set()
                    self._on_failure(error)
            else:
                self._on_durable(block)

    def _make_durable(self, block: int, futures: list[Future[Checksums]], summary_HS: Payloads | None) -> None:
        shape, store = self._run.shape, self._run.store
        checksums_RH = np.empty((shape.num_rows, shape.num_heads), dtype=np.uint32)
        for chunk, future in zip(store.chunks, futures, strict=True):
            heads = slice(chunk.heads.start - shape.first_head, chunk.heads.stop - shape.first_head)
            checksums_RH[chunk.rows.start : chunk.rows.stop, heads] = future.result()
        if self._failed.is_set():
            raise StorageError("not journaled, because an earlier block could not be", block=block)
        self._step("chunks", block)
        store.sync_names(block)
        self._step("names", block)
        self._run.commit(block, checksums_RH, b"" if summary_HS is None else summary_HS.tobytes())
        self._step("journaled", block)
