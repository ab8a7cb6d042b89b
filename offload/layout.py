"""How a block's payloads are cut into chunks, each a file of its own.

    array [block, layer, head, bytes] uint8     chunk (1, chunk_layers, chunk_heads, P)
    file  <array>/c.<block>.<layer chunk>.<head chunk>.0     chunk_layers * chunk_heads payloads, then their CRC-32C

The rule:
1. A chunk is of one block: it is written once, when the block is committed.
2. It is of one head, so that a gang of any size can own whole chunks.
3. It has the most layers that divide the layers evenly and keep the file within 8 MiB. So a small model's chunk spans
   all layers, and files are of 0.5 to 8 MiB wherever a head's share of a block reaches 0.5 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from longtake.kernels.errors import ConfigError
from longtake.offload.shape import ModelKVShape

MAX_CHUNK_BYTES = 8 << 20
CRC_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One chunk of any block: its place in the grid, and the layers and model heads that it holds."""

    layer_index: int
    head_index: int
    layers: range
    heads: range

    def key(self, block: int) -> str:
        """Its file's name in the array's folder."""
        return f"c.{block}.{self.layer_index}.{self.head_index}.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLayout:
    """The grid of chunks of one block of the whole model."""

    num_layers: int
    model_heads: int
    payload_bytes: int
    chunk_layers: int
    chunk_heads: int

    @property
    def file_bytes(self) -> int:
        """Size of every chunk file."""
        return self.chunk_layers * self.chunk_heads * self.payload_bytes + CRC_BYTES

    def chunks(self, heads: range) -> Iterator[Chunk]:
        """The chunks that hold a range of the model's heads.

        Raises:
            ConfigError: the range cuts a chunk in two.
        """
        if heads.start % self.chunk_heads or heads.stop % self.chunk_heads:
            raise ConfigError(
                f"heads {heads.start}..{heads.stop - 1} cut a chunk of {self.chunk_heads} heads in two; use a gang "
                f"size whose ranks own whole groups of {self.chunk_heads}"
            )
        for layer in range(0, self.num_layers, self.chunk_layers):
            for head in range(heads.start, heads.stop, self.chunk_heads):
                yield Chunk(
                    layer_index=layer // self.chunk_layers,
                    head_index=head // self.chunk_heads,
                    layers=range(layer, layer + self.chunk_layers),
                    heads=range(head, head + self.chunk_heads),
                )


def chunk_layout(shape: ModelKVShape) -> ChunkLayout:
    """Choose the chunks for a model.

    Args:
        shape: of any rank; only what all ranks share is used.
    """
    fitting = [
        layers
        for layers in range(1, shape.num_layers + 1)
        if shape.num_layers % layers == 0 and layers * shape.payload_bytes <= MAX_CHUNK_BYTES
    ]
    return ChunkLayout(
        num_layers=shape.num_layers,
        model_heads=shape.model_heads,
        payload_bytes=shape.payload_bytes,
        chunk_layers=max(fitting, default=1),
        chunk_heads=1,
    )
