"""What a rank keeps of a model's K/V: how many layers and heads, and how many bytes each payload has."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from longtake.kernels.errors import ConfigError


class PayloadFormat(Protocol):
    """The part of a codec that storage needs: a name, and how many units of bytes each layer's payloads have."""

    @property
    def name(self) -> str: ...

    @property
    def unit_bytes(self) -> int: ...

    @property
    def rows(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelKVShape:
    """The K/V of one block on one rank: a page for each layer.

    All of storage counts in rows of [H, U] bytes, U the codec's unit. A layer is one row, its payloads a unit each; or,
    where a codec gives layers different numbers of bytes, as many rows as the codec says::

        page of layer l     [H, rows[l] * U]: each head's payload lies in one piece
        its rows            row r is [H, U], the r-th unit of each head's payload

    Args:
        num_layers: transformer layers, L.
        num_heads: heads that this rank keeps, H.
        codec: the codec whose payloads these are; only its name and sizes are read.
        first_head: the model's number of this rank's first head.
        total_heads: heads of the whole model; None: this rank has them all.
    """

    num_layers: int
    num_heads: int
    codec: PayloadFormat
    first_head: int = 0
    total_heads: int | None = None

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.num_heads < 1 or self.codec.unit_bytes < 1:
            raise ConfigError(
                f"a cache needs layers, heads and payload bytes of at least 1, got num_layers={self.num_layers}, "
                f"num_heads={self.num_heads}, unit_bytes={self.codec.unit_bytes}"
            )
        if self.first_head < 0 or self.first_head + self.num_heads > self.model_heads:
            raise ConfigError(
                f"heads {self.first_head}..{self.first_head + self.num_heads - 1} of this rank lie outside "
                f"the model's {self.model_heads}"
            )
        if self.codec.rows and (len(self.codec.rows) != self.num_layers or min(self.codec.rows) < 1):
            raise ConfigError(
                f"codec {self.codec.name} has sizes for {len(self.codec.rows)} layers, the model has {self.num_layers}"
            )

    @property
    def model_heads(self) -> int:
        """Heads of the whole model."""
        return self.num_heads if self.total_heads is None else self.total_heads

    @property
    def unit_bytes(self) -> int:
        """Bytes of one head in one row, U."""
        return self.codec.unit_bytes

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each layer."""
        return self.codec.rows or (1,) * self.num_layers

    @property
    def num_rows(self) -> int:
        """Rows of a block, R."""
        return sum(self.rows)

    @property
    def first_rows(self) -> tuple[int, ...]:
        """The first row of each layer."""
        return tuple(accumulate(self.rows[:-1], initial=0))

    @property
    def most_rows(self) -> int:
        """Rows of the largest page."""
        return max(self.rows)

    @property
    def pages_a_frame(self) -> int:
        """Pages of any layer that the room of one block holds."""
        return self.num_rows // self.most_rows

    def payload_bytes(self, layer: int) -> int:
        """Bytes of one (block, layer, head), P."""
        return self.rows[layer] * self.unit_bytes

    def page_bytes(self, layer: int) -> int:
        """Bytes of one (block, layer) on this rank, H * P."""
        return self.num_heads * self.payload_bytes(layer)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on this rank, R * H * U."""
        return self.num_rows * self.num_heads * self.unit_bytes
