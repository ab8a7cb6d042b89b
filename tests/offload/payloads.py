"""Payloads of random bytes: storage must not care what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from longtake.offload.cache import KVCache
from longtake.offload.files import FileOps
from longtake.offload.reading import Reading
from longtake.offload.run import RunDirectory
from longtake.offload.shape import ModelKVShape
from longtake.offload.store import Payloads


@dataclass(frozen=True, slots=True, kw_only=True)
class Opaque:
    """A codec as far as storage sees one."""

    name: str = "opaque"
    unit_bytes: int = 48
    rows: tuple[int, ...] = ()


SHAPE = ModelKVShape(num_layers=8, num_heads=2, codec=Opaque(unit_bytes=24))
UNEVEN = ModelKVShape(num_layers=8, num_heads=2, codec=Opaque(unit_bytes=24, rows=(1, 3, 1, 2, 5, 1, 1, 2)))
"""Layers with different numbers of bytes: a frame holds three pages of any layer, where SHAPE's holds eight."""


def pages_of(block: int, shape: ModelKVShape = SHAPE) -> list[torch.Tensor]:
    """A block's pages by layer: a function of its number and of nothing else, so that any rank can make its heads."""
    generator = torch.Generator().manual_seed(block)
    heads = slice(shape.first_head, shape.first_head + shape.num_heads)
    sizes = [(shape.model_heads, shape.payload_bytes(layer)) for layer in range(shape.num_layers)]
    return [torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)[heads] for size in sizes]


def pages_on_host(block: int, shape: ModelKVShape = SHAPE) -> list[Payloads]:
    """The same for a store."""
    return [np.ascontiguousarray(page_HP.numpy()) for page_HP in pages_of(block, shape)]


def commit(cache: KVCache, block: int) -> None:
    """Commit a block's payloads."""
    opened = cache.begin_commit(block)
    for layer, page_HP in enumerate(pages_of(block, cache.shape)):
        opened.page(layer).copy_(page_HP)
    opened.complete()


def check_pages(reading: Reading, layer: int, blocks: Sequence[int], shape: ModelKVShape = SHAPE) -> None:
    """Compare one layer of a reading with what was committed."""
    pages_GHP, slots_N = reading.pages(layer)
    assert slots_N.dtype == torch.int32 and slots_N.shape == (len(blocks),)
    for slot, block in zip(slots_N.tolist(), blocks, strict=True):
        assert torch.equal(pages_GHP[slot].cpu(), pages_of(block, shape)[layer]), (block, layer)


def check_passes(cache: KVCache, blocks: Sequence[int], num_passes: int = 2) -> bool:
    """Read a plan pass after pass as a rollout does; returns whether it was streamed."""
    with cache.prepare(blocks) as reading:
        for _ in range(num_passes):
            for layer in range(cache.shape.num_layers):
                check_pages(reading, layer, blocks, cache.shape)
        return reading.streamed


def open_run(path: Path, ops: FileOps | None = None, shape: ModelKVShape = SHAPE) -> RunDirectory:
    """A shot's folder for one rank."""
    return RunDirectory(path, shape=shape, config_hash="c", ops=ops)
