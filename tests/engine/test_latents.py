"""The latent log: what is written comes back, and what is damaged or missing is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zarr

from longtake.engine.latents import LatentLog
from longtake.kernels.errors import StorageError

SHAPE = (4, 3, 5, 6)


def test_reads_what_was_written(tmp_path: Path) -> None:
    log = LatentLog(tmp_path / "latents.zarr", 6, SHAPE)
    blocks = [torch.randn(SHAPE) for _ in range(3)]
    blocks[1].zero_()  # an all-zero block is written like any other
    for index, block in enumerate(blocks):
        log.write(index, block)
    again = LatentLog.existing(tmp_path / "latents.zarr")
    assert len(again) == 6
    assert torch.equal(again.read(0, 3), torch.cat(blocks, dim=1))
    array = zarr.open_array(store=tmp_path / "latents.zarr", mode="r")
    assert torch.equal(torch.from_numpy(array[2]), blocks[2])  # plain zarr reads it


def test_names_what_is_missing_or_damaged(tmp_path: Path) -> None:
    log = LatentLog(tmp_path / "latents.zarr", 6, SHAPE)
    log.write(0, torch.randn(SHAPE))
    with pytest.raises(StorageError, match=r"latents of a block are missing.*block 1, path"):
        log.read(0, 2)
    chunk = LatentLog.existing(tmp_path / "latents.zarr").chunk(0)
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(StorageError, match=r"latents of a block are damaged.*block 0, path"):
        log.read(0, 1)


def test_refuses_another_shape(tmp_path: Path) -> None:
    LatentLog(tmp_path / "latents.zarr", 6, SHAPE)
    with pytest.raises(StorageError, match="not"):
        LatentLog(tmp_path / "latents.zarr", 7, SHAPE)
