"""The device tier's bytes: one tensor of equal slots, allocated once.

Legend: G slots, L layers, H heads of this rank, P payload bytes.

    pages_GHP   slot  0 .. L-1    frame 0: one block, its layers in order
                slot  L .. 2L-1   frame 1
                ...

A slot holds one (block, layer). L slots in a row are a frame and hold one block, so that a block moves in one copy, no
sequence of evictions can fragment the arena, and slot = frame * L + layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.errors import CapacityError
from longtake.offload.shape import ModelKVShape


class DeviceArena:
    """`num_frames * L` slots of [H, P] uint8 on one device. Holds bytes only; who is where is a FrameTable's."""

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
        num_slots = num_frames * shape.num_layers
        try:
            with torch.inference_mode(False):  # worker threads, outside the caller's inference mode, write it too
                self.pages_GHP = torch.empty(
                    (num_slots, shape.num_heads, shape.payload_bytes), dtype=torch.uint8, device=device
                )
        except (MemoryError, RuntimeError) as error:
            raise CapacityError(
                f"no room on {device} for an arena of {num_frames} blocks "
                f"({num_frames * shape.block_bytes:,} bytes): {error}; lower the cache's device budget"
            ) from error

    def frame_LHP(self, frame: int) -> Tensor:
        """The slots of one frame, a view [L, H, P] uint8."""
        first = frame * self.shape.num_layers
        return self.pages_GHP[first : first + self.shape.num_layers]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.pages_GHP.numel()


def slot_tables_LN(frames: list[int], *, num_layers: int, device: torch.device) -> Tensor:
    """The slots of a list of frames for every layer, in one asynchronous copy to the device.

    Args:
        frames: frame numbers, N of them, in reading order.
        num_layers: slots a frame.
        device: where the table is wanted.

    Returns:
        int32 [L, N]; row l holds frame * L + l. On CUDA the copy is ordered on the current stream, from pinned memory
        that PyTorch's caching host allocator keeps until the copy is done.
    """
    table_LN = torch.arange(num_layers, dtype=torch.int32)[:, None] + num_layers * torch.tensor(
        frames, dtype=torch.int32
    ).reshape(1, -1)
    return to_device(table_LN, device)


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to a device without making the host wait."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)
