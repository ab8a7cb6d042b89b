"""Progressive residual quantisation: round to nearest, then round what is left: `prq2`, `prq4`.

Two planes of codes, each with its own float16 scale and zero point for groups of 64 channels of a token; the second
plane's grid spans the residual's own range. Bits an element: 2 * (bits + 0.5).

    section of one head:   | plane 0: a section of rtn | plane 1: a section of rtn |
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.codec import BlockGeometry, Side
from longtake.kernels.rtn import RoundToNearest
from longtake.kernels.tensor_codec import TensorCodec

NUM_PLANES = 2


class Progressive(TensorCodec):
    """Several planes of one codec, each over the residual of those before.

    Args:
        plane: codec of one plane.
    """

    def __init__(self, plane: TensorCodec) -> None:
        super().__init__(plane.geometry)
        self.plane = plane

    @property
    def num_bytes(self) -> int:
        return NUM_PLANES * self.plane.num_bytes

    def pack(self, x_HTD: Tensor) -> Tensor:
        rest, sections = x_HTD, []
        for _ in range(NUM_PLANES):
            sections.append(self.plane.pack(rest))
            rest = rest - self.plane.unpack(sections[-1])
        return torch.cat(sections, dim=-1)

    def unpack(self, section_B: Tensor) -> Tensor:
        size = self.plane.num_bytes
        return self.plane.unpack(section_B[..., :size]) + self.plane.unpack(section_B[..., size:])


def tensor_codec(name: str, geometry: BlockGeometry, side: Side) -> TensorCodec:
    """Make `prq2` or `prq4`; both sides alike."""
    return Progressive(RoundToNearest(geometry, int(name.removeprefix("prq"))))
