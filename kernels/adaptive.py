"""Precision where it is needed: `qaq2`, `qaq4` keep outliers, `tptq2`, `tptq4` give loud tokens more bits.

Both stand for a family rather than for one program; payloads keep a fixed size, so the shares are fixed, and what
adapts is who gets them.

qaq: of every 64 channels of a token, the one farthest from the token's mean is kept in float16 and takes no part in the
range of its group; the others are rounded to nearest. Bits an element: bits + 0.5 + 24/64.

    section:   | a section of rtn | outliers: T x D/64 x f16 | places: T x D/64 x u8 |

tptq: the quarter of the tokens with the widest range have codes of twice the bits. Bits an element: 1.25*bits + 0.5 +
the list of those tokens.

    section:   | low: rtn section of the others | high: rtn section of the loud tokens | which: u16 each, ascending |

Shape legend: T tokens, H heads, D head dim, M outliers of a token, L loud tokens, B bytes of a section.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.codec import BlockGeometry, Side
from longtake.kernels.errors import ConfigError
from longtake.kernels.grid import FLOAT16_MAX
from longtake.kernels.layout import Field, Layout
from longtake.kernels.rtn import RoundToNearest
from longtake.kernels.tensor_codec import TensorCodec

CHANNELS_PER_OUTLIER = 64
TOKENS_PER_LOUD = 4


class OutlierAware(TensorCodec):
    """Round to nearest with the farthest values of each token kept apart.

    Args:
        geometry: the block; head dims of at most 256.
        bits: 2 or 4.
    """

    def __init__(self, geometry: BlockGeometry, bits: int) -> None:
        super().__init__(geometry)
        if geometry.head_dim > 256:
            raise ConfigError(f"qaq numbers channels with a byte: head dim {geometry.head_dim} is above 256.")
        self.rest = RoundToNearest(geometry, bits)
        kept = (geometry.num_tokens, max(1, geometry.head_dim // CHANNELS_PER_OUTLIER))
        self.layout = Layout(
            Field(name="rest", dtype=torch.uint8, shape=(self.rest.num_bytes,)),
            Field(name="outliers", dtype=torch.float16, shape=kept),
            Field(name="places", dtype=torch.uint8, shape=kept),
        )

    def pack(self, x_HTD: Tensor) -> Tensor:
        count = self.layout.fields[1].shape[1]
        middle = x_HTD.mean(-1, keepdim=True)
        order = torch.sort((x_HTD - middle).abs(), dim=-1, descending=True, stable=True).indices
        place = order[..., :count].sort(dim=-1).values
        section = self.layout.empty(x_HTD.shape[:1], x_HTD.device)
        outlier = x_HTD.gather(-1, place)
        rest = x_HTD.scatter(-1, place, middle.expand_as(outlier))
        self.layout.view(section, "rest").copy_(self.rest.pack(rest))
        self.layout.view(section, "outliers").copy_(outlier.clamp(-FLOAT16_MAX, FLOAT16_MAX))
        self.layout.view(section, "places").copy_(place)
        return section

    def unpack(self, section_B: Tensor) -> Tensor:
        x = self.rest.unpack(self.layout.view(section_B, "rest"))
        place = self.layout.view(section_B, "places").long()
        return x.scatter(-1, place, self.layout.view(section_B, "outliers").float())


class TokenTiers(TensorCodec):
    """Round to nearest with twice the bits for the tokens of widest range.

    Args:
        geometry: the block; at least 4 and at most 65536 tokens.
        bits: 2 or 4, of the quiet tokens.
    """

    def __init__(self, geometry: BlockGeometry, bits: int) -> None:
        super().__init__(geometry)
        tokens, dim = geometry.num_tokens, geometry.head_dim
        if not TOKENS_PER_LOUD <= tokens <= 1 << 16:
            raise ConfigError(f"tptq takes blocks of {TOKENS_PER_LOUD} to 65536 tokens: got {tokens}.")
        self.num_loud = tokens // TOKENS_PER_LOUD
        self.low = RoundToNearest(BlockGeometry(num_tokens=tokens - self.num_loud, head_dim=dim), bits)
        self.high = RoundToNearest(BlockGeometry(num_tokens=self.num_loud, head_dim=dim), 2 * bits)
        self.layout = Layout(
            Field(name="low", dtype=torch.uint8, shape=(self.low.num_bytes,)),
            Field(name="high", dtype=torch.uint8, shape=(self.high.num_bytes,)),
            Field(name="which", dtype=torch.int16, shape=(self.num_loud,)),
        )

    def _order(self, which_L: Tensor) -> Tensor:
        """Tokens in stored order, quiet ones first, each kind ascending: int64 [..., T]."""
        loud = torch.zeros((*which_L.shape[:-1], self.geometry.num_tokens), dtype=torch.int8, device=which_L.device)
        return loud.scatter(-1, which_L, torch.ones_like(which_L, dtype=torch.int8)).sort(dim=-1, stable=True).indices

    def pack(self, x_HTD: Tensor) -> Tensor:
        width = x_HTD.amax(-1) - x_HTD.amin(-1)
        which = torch.sort(width, dim=-1, descending=True, stable=True).indices[:, : self.num_loud].sort(-1).values
        order = self._order(which)
        sorted_HTD = x_HTD.gather(1, order.unsqueeze(-1).expand_as(x_HTD))
        quiet, loud = torch.split(sorted_HTD, [self.low.geometry.num_tokens, self.num_loud], dim=1)
        section = self.layout.empty(x_HTD.shape[:1], x_HTD.device)
        self.layout.view(section, "low").copy_(self.low.pack(quiet))
        self.layout.view(section, "high").copy_(self.high.pack(loud))
        self.layout.view(section, "which").copy_((which + 0x8000) % 0x10000 - 0x8000)
        return section

    def unpack(self, section_B: Tensor) -> Tensor:
        low = self.low.unpack(self.layout.view(section_B, "low"))
        high = self.high.unpack(self.layout.view(section_B, "high"))
        which = self.layout.view(section_B, "which").long() % 0x10000
        stored = torch.cat((low, high), dim=-2)
        place = self._order(which).unsqueeze(-1).expand_as(stored)
        return torch.zeros_like(stored).scatter(-2, place, stored)


def tensor_codec(name: str, geometry: BlockGeometry, side: Side) -> TensorCodec:
    """Make `qaq2`, `qaq4`, `tptq2` or `tptq4`; both sides alike."""
    if name.startswith("qaq"):
        return OutlierAware(geometry, int(name.removeprefix("qaq")))
    return TokenTiers(geometry, int(name.removeprefix("tptq")))
