"""The host tier's bytes: pinned memory, allocated once.

Legend: L layers, H heads of this rank, P payload bytes of a layer, F frames.

    slab 0    frame 0 | frame 1 | ... | frame F-1      each [H, P]: one (block, layer 0)
    slab 1    frame 0 | frame 1 | ...                  layer 1
    ...

Layer by layer, because a streamed history is read so: neighbouring frames of a layer move in one large copy. A slab
begins on a memory page of its own and is pinned by itself; no copy crosses two.

Where layers have different numbers of bytes, places in the device's ring lie as far apart as its largest page is long,
so that no two blocks' pages move together. There is one slab then, frame after frame, each with the pages of its layers
in order; a frame that stages pages on their way from the disk is cut into pages of the largest size.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longtake.kernels.errors import CapacityError
from longtake.offload.numa import near
from longtake.offload.shape import ModelKVShape


class HostPool:
    """`num_frames` frames of one block each, in host memory; page-locked when the device is a CUDA one."""

    def __init__(self, *, shape: ModelKVShape, num_frames: int, device: torch.device) -> None:
        """Allocate and pin.

        Args:
            shape: geometry of a block on this rank.
            num_frames: blocks that fit.
            device: what the memory is to be copied to and from.

        Raises:
            CapacityError: the host has no room, or the system refuses to pin that much.
        """
        self.shape = shape
        self.num_frames = num_frames
        self.device = device
        self._registered: list[int] = []
        whole = bool(shape.codec.rows)
        slabs = 1 if whole else shape.num_layers
        slab_bytes = -(-num_frames * shape.block_bytes // slabs // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            with torch.inference_mode(False):
                memory = torch.frombuffer(mmap.mmap(-1, max(1, slabs * slab_bytes)), dtype=torch.uint8)
        except (OSError, MemoryError, RuntimeError) as error:
            raise CapacityError(
                f"no room for a host pool of {num_frames} blocks ({num_frames * shape.block_bytes:,} bytes): {error}; "
                f"lower the cache's host budget"
            ) from error
        self._memory = memory
        frame_bytes = shape.block_bytes if whole else shape.page_bytes(0)
        with torch.inference_mode(False):
            self._frames_SFB = memory.as_strided((slabs, num_frames, frame_bytes), (slab_bytes, frame_bytes, 1))
            row_bytes = shape.num_heads * shape.unit_bytes
            of_layers = [
                self._frames_SFB[0, :, row * row_bytes : (row + count) * row_bytes]
                if whole
                else self._frames_SFB[layer]
                for layer, (row, count) in enumerate(zip(shape.first_rows, shape.rows, strict=True))
            ]
            self.slabs = tuple(of_layer_FB.unflatten(1, (shape.num_heads, -1)) for of_layer_FB in of_layers)
        if device.type == "cuda" and num_frames:
            self._pin()

    def _pin(self) -> None:
        """Page-lock slab by slab in place: PyTorch's own pinned allocator would round the size up to a power of two.

        Pinning is also what first touches the memory, so it comes from the node of the CPU that does it.
        """
        runtime = torch.cuda.cudart()
        with near(self.device):
            for slab_FB in self._frames_SFB:
                address = slab_FB.data_ptr()
                try:
                    torch.cuda.check_error(runtime.cudaHostRegister(address, slab_FB.numel(), 0))
                except RuntimeError as error:
                    self.close()
                    with contextlib.suppress(RuntimeError):  # CUDA would tell of the failure once more, elsewhere
                        torch.ones(1, device=self.device)
                    raise CapacityError(
                        f"the system refuses to pin {self.nbytes:,} bytes of host memory: {error}; lower the cache's "
                        f"host budget or raise the limit on locked memory"
                    ) from error
                self._registered.append(address)

    def pages(self, frame: int) -> list[Tensor]:
        """A frame's pages, views uint8 [H, P] by layer, each contiguous."""
        return [slab_FHP[frame] for slab_FHP in self.slabs]

    def payloads(self, frame: int) -> list[npt.NDArray[np.uint8]]:
        """The same bytes for the store."""
        return [page_HP.numpy() for page_HP in self.pages(frame)]

    def staging_pages(self, frame: int) -> list[Tensor]:
        """A frame as pages for any layer, uint8 [H, P of the largest]."""
        size = self.shape.most_rows * self.shape.num_heads * self.shape.unit_bytes
        return [
            page_B.view(self.shape.num_heads, -1)
            for frame_B in self._frames_SFB[:, frame]
            for page_B in frame_B.split(size)
            if page_B.numel() == size
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return self._memory.numel()

    def close(self) -> None:
        """Unpin; no copy may be under way."""
        for address in self._registered:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._registered.clear()
