"""What a cache hands out: blocks to read, and a block to fill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from torch import Tensor

from longtake.kernels.errors import ConfigError
from longtake.offload.lanes import Fence
from longtake.offload.streaming import Ring


class Reading:
    """Blocks of one plan, readable on the device until `release`; a context manager.

    Belongs to the thread and, on CUDA, to the stream that prepared it.
    """

    def __init__(
        self,
        *,
        blocks: tuple[int, ...],
        pages: Sequence[Tensor],
        tables_DLN: Tensor,
        ring: Ring | None,
        on_release: Callable[[list[Fence]], None],
    ) -> None:
        """Made by `KVCache.prepare`.

        Args:
            blocks: of the plan, in its order.
            pages: the arena's, by layer.
            tables_DLN: int32 slots for each slot set of the ring (one without a ring), layer and block.
            ring: moves what does not fit; None: all is resident.
            on_release: called once, with fences of copies still under way.
        """
        self.blocks = blocks
        self.released = False
        self._pages, self._tables_DLN = pages, tables_DLN
        self._ring, self._on_release = ring, on_release

    @property
    def parts(self) -> tuple[Reading, ...]:
        """By form of the blocks (`longtake.offload.forms`): this one has only the first."""
        return (self,)

    @property
    def streamed(self) -> bool:
        """Whether pages pass through a ring; layers are then best read in order, pass after pass."""
        return self._ring is not None

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """The payloads of one layer.

        In streamed mode the current stream waits for them, and they are valid until another layer is asked for.

        Args:
            layer: 0 .. L-1.

        Returns:
            pages_GHP uint8 [G, H, P], the arena as pages of this layer, and slots_N int32 [N] on the same device: the
            slots of the plan's blocks, in the plan's order. Not to be written.

        Raises:
            StorageError: streamed from the disk, and a page could not be read.
        """
        if self.released:
            raise ConfigError("this reading was released; prepare the plan again")
        slot_set = 0 if self._ring is None else self._ring.turn_to(layer)
        return self._pages[layer], self._tables_DLN[slot_set, layer]

    @property
    def table_bytes(self) -> int:
        """Bytes of the slot tables on the device."""
        return self._tables_DLN.numel() * self._tables_DLN.element_size()

    def release(self) -> None:
        """Let the blocks go; a second call does nothing."""
        if not self.released:
            self.released = True
            self._on_release([] if self._ring is None else self._ring.stop())
            del self._on_release  # it refers to this reading: tables would stay until the garbage collector comes

    def __enter__(self) -> Reading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Commit:
    """The frame of a block that is being encoded; ends with `complete` or `abort`."""

    def __init__(
        self,
        *,
        block: int,
        pages: Sequence[Tensor],
        on_complete: Callable[[], None],
        on_abort: Callable[[], None],
    ) -> None:
        """Made by `KVCache.begin_commit`."""
        self.block = block
        self.open = True
        self.summary_HS: Tensor | None = None
        self._pages = pages
        self._on_complete, self._on_abort = on_complete, on_abort

    @property
    def parts(self) -> tuple[Commit, ...]:
        """By form of the block (`longtake.offload.forms`): this one has only the first."""
        return (self,)

    def page(self, layer: int) -> Tensor:
        """Where one layer's payloads go: uint8 [H, P], contiguous, to be filled wholly on the current stream."""
        if not self.open:
            raise ConfigError(f"the commit of block {self.block} has ended")
        return self._pages[layer]

    def attach(self, summary_HS: Tensor) -> None:
        """Have a few bytes a head journaled with the block, so that they exist whenever the block does.

        Args:
            summary_HS: uint8 [H, any], on the device, filled on the current stream by the time of `complete`; must stay
                as it is as long as the cache is open.
        """
        self.summary_HS = summary_HS

    def complete(self) -> None:
        """Make the block part of the history. Every page must be filled, or queued to be, on the current stream."""
        if not self.open:
            raise ConfigError(f"the commit of block {self.block} has ended")
        self.open = False
        self._on_complete()

    def abort(self) -> None:
        """Drop the block; the cache is as it was before `begin_commit`. Does nothing when the commit has ended."""
        if self.open:
            self.open = False
            self._on_abort()
