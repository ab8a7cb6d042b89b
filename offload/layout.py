"""How a block's payloads are cut into chunks, each a file of its own.

    array [block, row, head, bytes] uint8       chunk (1, chunk_rows, chunk_heads, U)
    file  <array>/c.<block>.<row chunk>.<head chunk>.0       chunk_rows * chunk_heads units, then their CRC-32C

A row is a layer, a unit its payload, but where a codec gives layers several rows (`longtake.offload.shape`).

The rule:
1. A chunk is of one block: it is written once, when the block is committed.
2. It is of one head, so that a gang of any size can own whole chunks.
3. It has the most rows that divide the rows evenly and keep the file within 8 MiB. So a small model's chunk spans
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
    """One chunk of any block: its place in the grid, and the rows and model heads that it holds."""

    row_index: int
    head_index: int
    rows: range
    heads: range

    def key(self, block: int) -> str:
        """Its file's name in the array's folder."""
        return f"c.{block}.{self.row_index}.{self.head_index}.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLayout:
    """The grid of chunks of one block of the whole model; ``of`` says what its rows are: "layer", or "row"."""

    num_rows: int
    model_heads: int
    unit_bytes: int
    chunk_rows: int
    chunk_heads: int
    of: str = "layer"

    @property
    def file_bytes(self) -> int:
        """Size of every chunk file."""
        return self.chunk_rows * self.chunk_heads * self.unit_bytes + CRC_BYTES

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
        for row in range(0, self.num_rows, self.chunk_rows):
            for head in range(heads.start, heads.stop, self.chunk_heads):
                yield Chunk(
                    row_index=row // self.chunk_rows,
                    head_index=head // self.chunk_heads,
                    rows=range(row, row + self.chunk_rows),
                    heads=range(head, head + self.chunk_heads),
                )


def chunk_layout(shape: ModelKVShape) -> ChunkLayout:
    """Choose the chunks for a model.

    Args:
        shape: of any rank; only what all ranks share is used.
    """
    fitting = [
        rows
        for rows in range(1, shape.num_rows + 1)
        if shape.num_rows % rows == 0 and rows * shape.unit_bytes <= MAX_CHUNK_BYTES
    ]
    return ChunkLayout(
        num_rows=shape.num_rows,
        model_heads=shape.model_heads,
        unit_bytes=shape.unit_bytes,
        chunk_rows=max(fitting, default=1),
        chunk_heads=1,
        of="row" if shape.codec.rows else "layer",
    )
