"""Half of a codec: what turns one tensor, K or V, of one block into one section of a payload, and back.

Shape legend: T tokens of a block, H heads, D head dim, G slots of an arena, N blocks read, X rows of the scratch (X >=
N*T), B bytes of one tensor's section.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longtake.kernels.layout import Layout
from longtake.kernels.rotary import Rotary, rotate_pairs
from longtake.kernels.scaling import Scaling

if TYPE_CHECKING:
    from longtake.kernels.codec import BlockGeometry

_UNPACK_CHUNK_ELEMENTS = 1 << 24


class TensorCodec(ABC):
    """One tensor, K or V, of one block <-> one section of a payload.

    `pack` and `unpack` are the plain reference, on any device, in float32. On CUDA, a codec that has kernels uses them
    instead: `pack_into` and `unpack_into`, which the pair codec calls, choose.

    Args:
        geometry: the block.
    """

    geometry: BlockGeometry
    layout: Layout
    """Of one head's section, for codecs that are not made of others."""

    def __init__(self, geometry: BlockGeometry) -> None:
        self.geometry = geometry

    @property
    def has_kernels(self) -> bool:
        """Whether Triton kernels cover this geometry."""
        return False

    @property
    def recordable(self) -> bool:
        """As Codec's."""
        return self.has_kernels

    @property
    def num_bytes(self) -> int:
        """Bytes of one head's section; a multiple of 16."""
        return self.layout.num_bytes

    @abstractmethod
    def pack(self, x_HTD: Tensor) -> Tensor:
        """Encode heads: float32 [H, T, D] -> uint8 [H, num_bytes]."""

    @abstractmethod
    def unpack(self, section_B: Tensor) -> Tensor:
        """Decode sections: uint8 [..., num_bytes] -> float32 [..., T, D]."""

    def pack_into(self, x_THD: Tensor, out_HB: Tensor) -> None:
        """Encode [T, H, D] of any float type and strides into a section of a page."""
        if x_THD.is_cuda and self.has_kernels:
            self.pack_by_kernels(x_THD, out_HB)
        else:
            self.pack_plainly(x_THD, out_HB)

    def pack_plainly(self, x_THD: Tensor, out_HB: Tensor) -> None:
        """As `pack_into`, by the reference."""
        out_HB.copy_(self.pack(x_THD.transpose(0, 1).float()))

    def pack_by_kernels(self, x_THD: Tensor, out_HB: Tensor) -> None:
        """As `pack_into`, by the codec's kernels."""
        raise NotImplementedError

    def pack_pair_into(self, other: TensorCodec, x_THD: Tensor, y_THD: Tensor, out_HB: Tensor) -> None:
        """Encode two tensors, the second by another codec, into sections that follow one another."""
        self.pack_into(x_THD, out_HB[:, : self.num_bytes])
        other.pack_into(y_THD, out_HB[:, self.num_bytes :])

    def unpack_into(
        self,
        sections_GHB: Tensor,
        slots_N: Tensor,
        rotary: Rotary | None,
        out_HXD: Tensor,
        scaling: Scaling | None = None,
    ) -> None:
        """Decode the sections of the slots, turn by RoPE and scale if asked, and write their N*T rows head-major."""
        unpack = self.unpack_by_kernels if sections_GHB.is_cuda and self.has_kernels else self.unpack_plainly
        unpack(sections_GHB, slots_N, rotary, out_HXD, scaling)

    def unpack_by_kernels(
        self, sections_GHB: Tensor, slots_N: Tensor, rotary: Rotary | None, out_HXD: Tensor, scaling: Scaling | None
    ) -> None:
        """As `unpack_into`, by the codec's kernels."""
        raise NotImplementedError

    def unpack_plainly(
        self, sections_GHB: Tensor, slots_N: Tensor, rotary: Rotary | None, out_HXD: Tensor, scaling: Scaling | None
    ) -> None:
        """As `unpack_into`, by the reference."""
        tokens, num_heads, dim = self.geometry.num_tokens, out_HXD.shape[0], self.geometry.head_dim
        chunk = max(1, _UNPACK_CHUNK_ELEMENTS // (num_heads * tokens * dim))
        row = 0
        for slots in torch.split(slots_N, chunk):
            x_NHTD = self.unpack(sections_GHB.index_select(0, slots))
            count = x_NHTD.shape[0]
            x_HXD = x_NHTD.transpose(0, 1).reshape(num_heads, count * tokens, dim)
            if rotary is not None:
                frames = tokens // rotary.tokens_per_frame
                x_HXD = rotate_pairs(x_HXD, rotary.frames(row // tokens * frames, count * frames))
            if scaling is not None:
                x_HXD = scaling.store(x_HXD)
            out_HXD[:, row : row + count * tokens].copy_(x_HXD)
            row += count * tokens


class HeadwiseCodec(TensorCodec):
    """One that packs head by head: a matrix product's last bits may depend on the size of a batch."""

    def pack(self, x_HTD: Tensor) -> Tensor:
        section_HB = self.layout.empty(x_HTD.shape[:1], x_HTD.device)
        for x_TD, payload_B in zip(x_HTD, section_HB, strict=True):
            self.pack_head(x_TD, payload_B)
        return section_HB

    @abstractmethod
    def pack_head(self, x_TD: Tensor, payload_B: Tensor) -> None:
        """Encode one head, float32 [T, D], into its zeroed section, uint8 [num_bytes]."""
