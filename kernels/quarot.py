"""QuaRot: a Hadamard rotation of each head's channels, then round to nearest: `quarot2`, `quarot4`.

The rotation spreads outlier channels (arXiv 2404.00456); grids are asymmetric with all 2^bits levels, groups of 64
channels of a token, as in `rtn`, whose section layout it shares. Bits an element: bits + 0.5.
"""

from __future__ import annotations

from torch import Tensor

from longtake.kernels.codec import BlockGeometry, Side
from longtake.kernels.hadamard import hadamard
from longtake.kernels.rtn import RoundToNearest
from longtake.kernels.tensor_codec import TensorCodec


class Rotated(TensorCodec):
    """Another tensor codec behind a Hadamard rotation.

    Args:
        inner: codec of the rotated tensor.
    """

    def __init__(self, inner: TensorCodec) -> None:
        super().__init__(inner.geometry)
        self.inner = inner

    @property
    def num_bytes(self) -> int:
        return self.inner.num_bytes

    def pack(self, x_HTD: Tensor) -> Tensor:
        return self.inner.pack(hadamard(x_HTD))

    def unpack(self, section_B: Tensor) -> Tensor:
        return hadamard(self.inner.unpack(section_B))


def tensor_codec(name: str, geometry: BlockGeometry, side: Side) -> TensorCodec:
    """Make `quarot2` or `quarot4`; both sides alike."""
    return Rotated(RoundToNearest(geometry, int(name.removeprefix("quarot"))))
