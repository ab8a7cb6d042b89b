"""KIVI: keys quantised per channel, values per token: `kivi2`, `kivi4`.

Keys have channels that are loud in every token; a grid that runs along tokens gives each channel its own range
(arXiv 2402.02750). Groups are 64 tokens of one channel for K (the last may be shorter) and 64 channels of one token for
V, each with a float16 scale and zero point. Bits an element: bits + 0.5.

    section of K:   | codes: T rows of D*bits/8 bytes | grid: ceil(T/64) x D x (scale f16, zero f16) |

V's section is `rtn`'s.

Shape legend: T tokens, H heads, D head dim, G groups of tokens, C tokens of a group, B bytes of a section.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from longtake.kernels.codec import BlockGeometry, Side
from longtake.kernels.layout import Field, Layout, pack_codes, packed_bytes, unpack_codes
from longtake.kernels.rtn import RoundToNearest, decode_groups, encode_groups
from longtake.kernels.tensor_codec import TensorCodec

GROUP = 64


class PerChannel(TensorCodec):
    """Asymmetric grids over groups of a channel's tokens.

    Args:
        geometry: the block.
        bits: 2 or 4.
    """

    def __init__(self, geometry: BlockGeometry, bits: int) -> None:
        super().__init__(geometry)
        self.bits = bits
        self.num_groups = -(-geometry.num_tokens // GROUP)
        self.layout = Layout(
            Field(name="codes", dtype=torch.uint8, shape=(geometry.num_tokens, packed_bytes(geometry.head_dim, bits))),
            Field(name="grid", dtype=torch.float16, shape=(self.num_groups, geometry.head_dim, 2)),
        )

    def _groups(self, x_HTD: Tensor) -> Tensor:
        """[..., T, D] -> [..., G, D, C]; the last group is filled up with the last token."""
        tokens, dim = x_HTD.shape[-2:]
        filled = x_HTD
        if missing := self.num_groups * GROUP - tokens:
            tail = x_HTD[..., -1:, :].expand(*x_HTD.shape[:-2], missing, dim)
            filled = torch.cat((x_HTD, tail), dim=-2)
        return filled.reshape(*x_HTD.shape[:-2], self.num_groups, GROUP, dim).transpose(-1, -2)

    def pack(self, x_HTD: Tensor) -> Tensor:
        codes, grid = encode_groups(self._groups(x_HTD), self.bits)
        codes = codes.transpose(-1, -2).flatten(1, 2)[:, : self.geometry.num_tokens]
        section = self.layout.empty(x_HTD.shape[:1], x_HTD.device)
        self.layout.view(section, "codes").copy_(pack_codes(codes, self.bits))
        self.layout.view(section, "grid").copy_(grid)
        return section

    def unpack(self, section_B: Tensor) -> Tensor:
        codes = unpack_codes(self.layout.view(section_B, "codes"), self.bits)
        tokens, dim = codes.shape[-2:]
        codes = pad(codes, (0, 0, 0, self.num_groups * GROUP - tokens))
        codes = codes.reshape(*codes.shape[:-2], self.num_groups, GROUP, dim).transpose(-1, -2)
        x = decode_groups(codes, self.layout.view(section_B, "grid")).transpose(-1, -2)
        return x.flatten(-3, -2)[..., :tokens, :]


def tensor_codec(name: str, geometry: BlockGeometry, side: Side) -> TensorCodec:
    """Make `kivi2` or `kivi4`: per channel for K, per token for V."""
    bits = int(name.removeprefix("kivi"))
    return PerChannel(geometry, bits) if side is Side.K else RoundToNearest(geometry, bits)
