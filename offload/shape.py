"""What a rank keeps of a model's K/V: how many layers and heads, and how many bytes each payload has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from longtake.kernels.errors import ConfigError


class PayloadFormat(Protocol):
    """The part of a codec that storage needs: a name, and one size for all its payloads."""

    @property
    def name(self) -> str: ...

    @property
    def payload_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelKVShape:
    """The K/V of one block on one rank: `num_layers` pages of [num_heads, payload_bytes].

    Args:
        num_layers: transformer layers, L.
        num_heads: heads that this rank keeps, H.
        codec: the codec whose payloads these are; only its name and payload size are read.
        first_head: the model's number of this rank's first head.
        total_heads: heads of the whole model; None: this rank has them all.
    """

    num_layers: int
    num_heads: int
    codec: PayloadFormat
    first_head: int = 0
    total_heads: int | None = None

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.num_heads < 1 or self.codec.payload_bytes < 1:
            raise ConfigError(
                f"a cache needs layers, heads and payload bytes of at least 1, got num_layers={self.num_layers}, "
                f"num_heads={self.num_heads}, payload_bytes={self.codec.payload_bytes}"
            )
        if self.first_head < 0 or self.first_head + self.num_heads > self.model_heads:
            raise ConfigError(
                f"heads {self.first_head}..{self.first_head + self.num_heads - 1} of this rank lie outside "
                f"the model's {self.model_heads}"
            )

    @property
    def model_heads(self) -> int:
        """Heads of the whole model."""
        return self.num_heads if self.total_heads is None else self.total_heads

    @property
    def payload_bytes(self) -> int:
        """Bytes of one (block, layer, head), P."""
        return self.codec.payload_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one (block, layer) on this rank, H * P."""
        return self.num_heads * self.payload_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on this rank, L * H * P."""
        return self.num_layers * self.page_bytes
