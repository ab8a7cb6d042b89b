"""Plain storage: `fp32`, exact for float32 compute, and `bf16`, exact for bfloat16 compute.

    section of one head:   | x_TD, row by row | pad to 16 bytes |

Keys are stored before RoPE here too, so a dense cache obeys the same rules as a compressed one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.codec import BlockGeometry, Side
from longtake.kernels.head_dims import HEAD_DIMS
from longtake.kernels.layout import Field, Layout
from longtake.kernels.rotary import Rotary
from longtake.kernels.scaling import Scaling
from longtake.kernels.tensor_codec import TensorCodec

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class DenseCodec(TensorCodec):
    """One tensor stored as it is, rounded to a dtype.

    Args:
        geometry: the block.
        dtype: what is stored.
    """

    def __init__(self, geometry: BlockGeometry, dtype: torch.dtype) -> None:
        super().__init__(geometry)
        self.dtype = dtype
        self.layout = Layout(Field(name="x", dtype=dtype, shape=(geometry.num_tokens, geometry.head_dim)))

    def pack(self, x_HTD: Tensor) -> Tensor:
        section = self.layout.empty(x_HTD.shape[:1], x_HTD.device)
        self.layout.view(section, "x").copy_(x_HTD)
        return section

    @property
    def has_kernels(self) -> bool:
        """For reading; to write, PyTorch's own copy does."""
        return self.geometry.head_dim in HEAD_DIMS

    @property
    def recordable(self) -> bool:
        return True

    def pack_into(self, x_THD: Tensor, out_HB: Tensor) -> None:
        self.layout.view(out_HB, "x").copy_(x_THD.transpose(0, 1))
        self.layout.clear_padding(out_HB)

    def unpack(self, section_B: Tensor) -> Tensor:
        return self.layout.view(section_B, "x").float()

    def unpack_by_kernels(
        self, sections_GHB: Tensor, slots_N: Tensor, rotary: Rotary | None, out_HXD: Tensor, scaling: Scaling | None
    ) -> None:
        from longtake.kernels import dense_triton

        dense_triton.materialise(sections_GHB, slots_N, rotary, out_HXD, self, scaling)


def tensor_codec(name: str, geometry: BlockGeometry, side: Side) -> TensorCodec:
    """Make `fp32` or `bf16`; both sides alike."""
    return DenseCodec(geometry, _DTYPES[name])
