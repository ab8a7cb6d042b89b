"""TurboQuant: a random rotation and the best levels for a Gaussian: `turboquant2`, `turboquant3`, `turboquant4`.

A token's vector is divided by its length (a float16 number is kept) and rotated at random; its channels are then close
to Gaussian whatever the data, so one fixed table of Lloyd-Max levels serves all (arXiv 2504.19874, without its extra
sign sketch). The rotation is fixed, so it takes no bytes. Bits an element: bits + 16/D.

    section of one head:   | codes: T rows of D*bits/8 bytes | lengths: T x f16 |

Shape legend: T tokens, H heads, D head dim, B bytes of a section.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.codec import BlockGeometry, Side
from longtake.kernels.grid import FLOAT16_MAX, gaussian_levels, nearest_level
from longtake.kernels.hadamard import rotate_back, rotate_randomly
from longtake.kernels.layout import Field, Layout, pack_codes, packed_bytes, unpack_codes
from longtake.kernels.tensor_codec import TensorCodec


class TurboQuant(TensorCodec):
    """Lloyd-Max codes of randomly rotated, normalised tokens.

    Args:
        geometry: the block.
        bits: 2, 3 or 4.
    """

    def __init__(self, geometry: BlockGeometry, bits: int) -> None:
        super().__init__(geometry)
        self.bits = bits
        self.layout = Layout(
            Field(name="codes", dtype=torch.uint8, shape=(geometry.num_tokens, packed_bytes(geometry.head_dim, bits))),
            Field(name="lengths", dtype=torch.float16, shape=(geometry.num_tokens,)),
        )

    def pack(self, x_HTD: Tensor) -> Tensor:
        deviation = x_HTD.square().mean(-1).sqrt().clamp(max=FLOAT16_MAX).half()
        inverse = torch.where(deviation > 0, 1.0 / deviation.float(), torch.zeros_like(deviation, dtype=torch.float32))
        y = rotate_randomly(x_HTD * inverse.unsqueeze(-1))
        codes = nearest_level(y, gaussian_levels(self.bits, x_HTD.device))
        section = self.layout.empty(x_HTD.shape[:1], x_HTD.device)
        self.layout.view(section, "codes").copy_(pack_codes(codes, self.bits))
        self.layout.view(section, "lengths").copy_(deviation)
        return section

    def unpack(self, section_B: Tensor) -> Tensor:
        codes = unpack_codes(self.layout.view(section_B, "codes"), self.bits)
        levels = gaussian_levels(self.bits, section_B.device)
        y = levels[codes.long()] * self.layout.view(section_B, "lengths").float().unsqueeze(-1)
        return rotate_back(y)


def tensor_codec(name: str, geometry: BlockGeometry, side: Side) -> TensorCodec:
    """Make `turboquant2`, `turboquant3` or `turboquant4`; both sides alike."""
    return TurboQuant(geometry, int(name.removeprefix("turboquant")))
