"""Round to nearest: `int4` (also called `rtn4`), `rtn2`, `int8`.

Each token's channels are cut into groups of 64; a group has a float16 scale and a float16 zero point (its minimum), and
all 2^bits levels of its grid are used. scale = (max - min) / (levels - 1); code = floor((x - zero) / scale + 1/2),
clamped; x is read back as code * scale + zero.

    section of one head:   | codes: T rows of D*bits/8 bytes | grid: T rows of D/64 x (scale f16, zero f16) |

Bits an element: bits + 32/64. The Triton kernels write the same bytes as this reference: minimum, maximum, one product,
one correctly rounded division and one floor, nothing that another order of operations could change.

Shape legend: T tokens, H heads, D head dim, G groups of a token, C channels of a group, B bytes of a section.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.codec import BlockGeometry, Side
from longtake.kernels.errors import ConfigError
from longtake.kernels.head_dims import HEAD_DIMS
from longtake.kernels.layout import Field, Layout, pack_codes, packed_bytes, unpack_codes
from longtake.kernels.rotary import Rotary
from longtake.kernels.scaling import Scaling
from longtake.kernels.tensor_codec import TensorCodec

GROUP = 64
FLOAT16_MAX = 65504.0


class RoundToNearest(TensorCodec):
    """Asymmetric grids over groups of a token's channels.

    Args:
        geometry: the block; head dims below 64 are one group, others multiples of 64.
        bits: 2, 4 or 8.
    """

    def __init__(self, geometry: BlockGeometry, bits: int) -> None:
        super().__init__(geometry)
        self.bits = bits
        self.group = min(GROUP, geometry.head_dim)
        if geometry.head_dim % self.group or self.group * bits % 8:
            raise ConfigError(f"head dim {geometry.head_dim} does not divide into groups of {GROUP} channels.")
        self.num_groups = geometry.head_dim // self.group
        self.layout = Layout(
            Field(
                name="codes",
                dtype=torch.uint8,
                shape=(geometry.num_tokens, packed_bytes(geometry.head_dim, bits)),
            ),
            Field(name="grid", dtype=torch.float16, shape=(geometry.num_tokens, self.num_groups, 2)),
        )

    @property
    def has_kernels(self) -> bool:
        return self.group == GROUP and self.geometry.head_dim in HEAD_DIMS

    def pack(self, x_HTD: Tensor) -> Tensor:
        x_HTGC = x_HTD.reshape(*x_HTD.shape[:-1], self.num_groups, self.group)
        codes, grid = encode_groups(x_HTGC, self.bits)
        section = self.layout.empty(x_HTD.shape[:1], x_HTD.device)
        self.layout.view(section, "codes").copy_(pack_codes(codes.flatten(-2), self.bits))
        self.layout.view(section, "grid").copy_(grid)
        return section

    def unpack(self, section_B: Tensor) -> Tensor:
        codes = unpack_codes(self.layout.view(section_B, "codes"), self.bits)
        codes = codes.reshape(*codes.shape[:-1], self.num_groups, self.group)
        return decode_groups(codes, self.layout.view(section_B, "grid")).flatten(-2)

    @property
    def recordable(self) -> bool:
        return True

    def pack_by_kernels(self, x_THD: Tensor, out_HB: Tensor) -> None:
        from longtake.kernels import rtn_triton

        rtn_triton.encode(x_THD, out_HB, self)

    def unpack_by_kernels(
        self, sections_GHB: Tensor, slots_N: Tensor, rotary: Rotary | None, out_HXD: Tensor, scaling: Scaling | None
    ) -> None:
        from longtake.kernels import rtn_triton

        rtn_triton.materialise(sections_GHB, slots_N, rotary, out_HXD, self, scaling)


def encode_groups(x_C: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise groups to asymmetric grids.

    Args:
        x_C: float32 [..., C], a group in the last dim.
        bits: of a code.

    Returns:
        codes uint8 [..., C], and the grids float16 [..., 2]: scale, zero point.
    """
    top = 2**bits - 1
    low, high = x_C.amin(-1, keepdim=True), x_C.amax(-1, keepdim=True)
    zero = low.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    scale = ((high - low) * (1.0 / top)).clamp(max=FLOAT16_MAX).half()
    step = scale.float()
    inverse = torch.where(step > 0, 1.0 / step, torch.zeros_like(step))
    codes = torch.floor((x_C - zero.float()) * inverse + 0.5).clamp(0, top).to(torch.uint8)
    return codes, torch.cat((scale, zero), dim=-1)


def decode_groups(codes_C: Tensor, grid_2: Tensor) -> Tensor:
    """Undo `encode_groups`: uint8 [..., C] and float16 [..., 2] -> float32 [..., C]."""
    grid = grid_2.float()
    return codes_C.float() * grid[..., :1] + grid[..., 1:]


_BITS = {"int4": 4, "rtn4": 4, "rtn2": 2, "int8": 8}


def tensor_codec(name: str, geometry: BlockGeometry, side: Side) -> TensorCodec:
    """Make `int4` / `rtn4`, `rtn2` or `int8`; both sides alike."""
    return RoundToNearest(geometry, _BITS[name])
