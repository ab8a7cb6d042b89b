"""A spatial split: the centre of each latent frame by one codec, the rest by another, as `rtn4+rtn2`.

The centre is the middle of the rows and of the columns, about half of each, so about a quarter of the tokens; where a
side's number is odd, so is the centre's. Which tokens those are follows from the frame's rows and columns alone.

    section:   | section of the centre's tokens, frame by frame | section of the rest |

Shape legend: T tokens, H heads, D head dim, B bytes of a section.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from longtake.kernels.codec import BlockGeometry, Side, make_tensor_codec
from longtake.kernels.errors import ConfigError
from longtake.kernels.layout import Field, Layout
from longtake.kernels.tensor_codec import TensorCodec


def centre_tokens(rows: int, columns: int) -> list[int]:
    """The tokens of a frame's centre, ascending."""

    def middle(count: int) -> range:
        size = count // 2 + (count // 2 + count) % 2
        first = (count - size) // 2
        return range(first, first + size)

    return [row * columns + column for row in middle(rows) for column in middle(columns)]


@lru_cache(maxsize=16)
def _orders(geometry: BlockGeometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """A block's tokens in stored order, the centre's first, and the places where they are stored: int64 [T] each."""
    assert geometry.grid is not None
    rows, columns = geometry.grid
    inner = set(centre_tokens(rows, columns))
    order = sorted(range(geometry.num_tokens), key=lambda token: (token % (rows * columns) not in inner, token))
    stored = torch.tensor(order)
    return stored.to(device), torch.argsort(stored).to(device)


class SpatialSplit(TensorCodec):
    """Two codecs, each over its own tokens.

    Args:
        geometry: the block, with its grid.
        centre, rest: names of the codecs.
        side: which tensor.
    """

    def __init__(self, geometry: BlockGeometry, centre: str, rest: str, side: Side) -> None:
        super().__init__(geometry)
        if geometry.grid is None:
            raise ConfigError(
                f"codec {centre}+{rest} needs to know a frame's rows and columns: give the geometry's grid."
            )
        rows, columns = geometry.grid
        num_inner = len(centre_tokens(rows, columns))
        if not 0 < num_inner < rows * columns:
            raise ConfigError(f"a frame of {rows} x {columns} tokens has no centre and rest; use one codec for it.")
        self.num_centre = geometry.num_tokens // (rows * columns) * num_inner
        sizes = (self.num_centre, geometry.num_tokens - self.num_centre)
        self.parts = tuple(
            make_tensor_codec(name, BlockGeometry(num_tokens=size, head_dim=geometry.head_dim), side)
            for name, size in zip((centre, rest), sizes, strict=True)
        )
        self.layout = Layout(
            Field(name="centre", dtype=torch.uint8, shape=(self.parts[0].num_bytes,)),
            Field(name="rest", dtype=torch.uint8, shape=(self.parts[1].num_bytes,)),
        )

    def pack(self, x_HTD: Tensor) -> Tensor:
        ordered = x_HTD.index_select(1, _orders(self.geometry, x_HTD.device)[0])
        section = self.layout.empty(x_HTD.shape[:1], x_HTD.device)
        self.layout.view(section, "centre").copy_(self.parts[0].pack(ordered[:, : self.num_centre]))
        self.layout.view(section, "rest").copy_(self.parts[1].pack(ordered[:, self.num_centre :]))
        return section

    def unpack(self, section_B: Tensor) -> Tensor:
        parts = [
            part.unpack(self.layout.view(section_B, name))
            for name, part in zip(("centre", "rest"), self.parts, strict=True)
        ]
        return torch.cat(parts, dim=-2).index_select(-2, _orders(self.geometry, section_B.device)[1])


def tensor_codec(name: str, geometry: BlockGeometry, side: Side) -> TensorCodec:
    """Make `CENTRE+REST`.

    Raises:
        ConfigError: more than two names, an unknown one, or a geometry without a grid.
    """
    names = name.split("+")
    if len(names) != 2:
        raise ConfigError(f"codec {name!r}: a spatial split is written 'CENTRE+REST', with two codecs.")
    return SpatialSplit(geometry, names[0], names[1], side)
