"""The device tier's bytes: one tensor, allocated once.

Legend: L layers, R rows of a block, H heads of this rank, U bytes of a unit, P payload bytes of a layer.

    row  0 .. R-1    frame 0: one block, the pages of its layers in order
    row  R .. 2R-1   frame 1
    ...

A page holds one (block, layer) and takes one row of [H, U], or several (`longtake.offload.shape`). R rows that follow
one another are a frame and hold one block, so that no sequence of evictions can fragment the arena. A slot is the row
at which a page begins: frame * R + the layer's first row.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from longtake.kernels.errors import CapacityError
from longtake.offload.shape import ModelKVShape


class DeviceArena:
    """`num_frames` frames of one block each on one device. Holds bytes only; who is where is a FrameTable's."""

    def __init__(self, *, shape: ModelKVShape, num_frames: int, device: torch.device) -> None:
        """Allocate the arena.

        Args:
            shape: geometry of a block on this rank.
            num_frames: blocks that fit at once.
            device: where the slots live.

        Raises:
            CapacityError: the device has no room for it.
        """
        self.shape = shape
        self.num_frames = num_frames
        self.device = device
        try:
            with torch.inference_mode(False):  # worker threads, outside the caller's inference mode, write it too
                self._bytes = torch.empty(num_frames * shape.block_bytes, dtype=torch.uint8, device=device)
        except (MemoryError, RuntimeError) as error:
            raise CapacityError(
                f"no room on {device} for an arena of {num_frames} blocks "
                f"({num_frames * shape.block_bytes:,} bytes): {error}; lower the cache's device budget"
            ) from error

    @cached_property
    def pages(self) -> tuple[Tensor, ...]:
        """For each layer all pages that the arena could hold: views uint8 [slots, H, P], a row from slot to slot.

        Pages of several rows overlap their neighbours; those whose slots a table lists do not.
        """
        row_bytes, unit = self.shape.num_heads * self.shape.unit_bytes, self.shape.unit_bytes
        num_rows = self.num_frames * self.shape.num_rows
        with torch.inference_mode(False):
            return tuple(
                self._bytes.as_strided(
                    (max(0, num_rows - rows + 1), self.shape.num_heads, rows * unit), (row_bytes, rows * unit, 1)
                )
                for rows in self.shape.rows
            )

    def frame(self, frame: int) -> list[Tensor]:
        """The pages of one frame, views uint8 [H, P] by layer."""
        first = frame * self.shape.num_rows
        return [pages_GHP[first + row] for pages_GHP, row in zip(self.pages, self.shape.first_rows, strict=True)]

    def ring_slots(self, frame: int) -> list[int]:
        """Slots in one frame that hold a page of any layer each."""
        first, most = frame * self.shape.num_rows, self.shape.most_rows
        return [first + index * most for index in range(self.shape.pages_a_frame)]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self._bytes.numel()


def slot_tables_LN(frames: list[int], *, shape: ModelKVShape, device: torch.device) -> Tensor:
    """The slots of a list of frames for every layer, in one asynchronous copy to the device.

    Args:
        frames: frame numbers, N of them, in reading order.
        shape: of a block.
        device: where the table is wanted.

    Returns:
        int32 [L, N]; row l holds frame * R + the layer's first row. On CUDA the copy is ordered on the current stream,
        from pinned memory that PyTorch's caching host allocator keeps until the copy is done.
    """
    first_L1 = torch.tensor(shape.first_rows, dtype=torch.int32)[:, None]
    table_LN = first_L1 + shape.num_rows * torch.tensor(frames, dtype=torch.int32).reshape(1, -1)
    return to_device(table_LN, device)


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to a device without making the host wait."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)
