"""A rollout whose codec gives layers different numbers of bytes: the same film through every tier and after a stop."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtake.engine.config import CacheConfig, HistoryConfig, HistoryPolicy, HistoryTable, Positions, ShotConfig
from longtake.engine.essence import fingerprint
from longtake.engine.rollout import Rollout
from longtake.engine.shotcache import kv_shape, open_cache
from longtake.kernels.synthetic import random_basis
from longtake.offload.cache import KVCache
from longtake.offload.run import RunDirectory
from longtake.offload.verify import verify
from tests.engine.small_rollout import GEOMETRY, make_shot, random_contexts, random_model

FULL = HistoryConfig(policy=HistoryPolicy.FULL, positions=Positions.ABSOLUTE)
LAYERS = replace(GEOMETRY, num_layers=6)
QUARTERS = (4, 10, 6, 8, 4, 5)


def uneven_shot(quarters: tuple[int, ...] = QUARTERS) -> ShotConfig:
    shot = make_shot(FULL, "pc2", 8)
    table = HistoryTable(hash="made up", quarters=(quarters,) * 3)
    return replace(shot, model=replace(shot.model, transformer=LAYERS), history_basis=table)


def film_of(
    shot: ShotConfig, folder: Path | None = None, stops: tuple[int, ...] = (), device: str = "cpu"
) -> tuple[Tensor, KVCache]:
    """All blocks, and the last cache; stopped before some, and opened again with what is on the disk alone."""
    geometry = shot.model.transformer
    model = random_model(geometry, device)
    basis = random_basis(geometry.num_layers, geometry.num_heads, geometry.head_dim, device)
    blocks: list[Tensor] = []
    for until in (*stops, shot.num_blocks):
        with contextlib.ExitStack() as stack:
            runs = []
            if folder is not None:
                runs.append(RunDirectory(folder, shape=kv_shape(shot), config_hash=fingerprint(shot)))
                stack.callback(runs[0].close)
            cache = open_cache(shot, torch.device(device), runs=runs)
            stack.callback(cache.close)
            rollout = Rollout(shot, model, random_contexts(model, 1), cache, basis=basis)
            assert rollout.next_block == len(blocks)
            blocks += [rollout.step() for _ in range(until - len(blocks))]
    assert isinstance(cache, KVCache)
    return torch.stack(blocks).cpu(), cache


def test_a_block_takes_what_its_layers_take() -> None:
    shot = uneven_shot()
    whole, cache = film_of(shot)
    shape = kv_shape(shot)
    assert [shape.payload_bytes(layer) // shape.unit_bytes for layer in range(6)] == list(QUARTERS)
    assert cache.memory()["device_arena"] == 8 * shape.block_bytes
    assert shape.block_bytes == sum(QUARTERS) * LAYERS.num_heads * shape.unit_bytes
    assert not torch.equal(whole, film_of(uneven_shot((6,) * 6))[0])


@pytest.mark.parametrize("host_blocks", [5, 9])
def test_the_same_film_streamed_and_stopped(host_blocks: int, tmp_path: Path) -> None:
    """Six frames on the device, and few on the host: pages come through the ring, some from the disk one by one."""
    shot = uneven_shot()
    block_bytes = kv_shape(shot).block_bytes
    small = CacheConfig(codec="pc2", device_bytes=6 * block_bytes, host_bytes=host_blocks * block_bytes)
    whole, _ = film_of(shot)
    streamed, cache = film_of(replace(shot, cache=small), tmp_path / "streamed")
    assert torch.equal(streamed, whole) and cache.stats().up_bytes > 0
    assert torch.equal(film_of(replace(shot, cache=small), tmp_path / "stopped", stops=(3, 7))[0], whole)
    assert verify(tmp_path / "stopped") == []


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["dense", "fp8"])
def test_the_same_film_on_a_gpu(attention: str, tmp_path: Path) -> None:
    """By the codec's kernels, over pages that overlap in the arena; resident, with recorded passes, and streamed."""
    shot = uneven_shot()
    wide = replace(shot.model, transformer=replace(LAYERS, head_dim=64))
    shot = replace(shot, model=wide, attention=attention, num_frames=1 + 4 * (2 * 12 - 1))
    block_bytes = kv_shape(shot).block_bytes
    small = CacheConfig(codec="pc2", device_bytes=9 * block_bytes, host_bytes=9 * block_bytes)
    whole, _ = film_of(shot, device="cuda")
    streamed, cache = film_of(replace(shot, cache=small), tmp_path / "streamed", stops=(7,), device="cuda")
    assert whole.isfinite().all() and cache.stats().up_bytes > 0
    assert torch.equal(streamed, whole)


def test_a_flipped_bit_names_its_row(tmp_path: Path) -> None:
    film_of(uneven_shot(), tmp_path)
    chunk = sorted((tmp_path / "kv.zarr" / "pc2").glob("c.2.*"))[0]
    content = bytearray(chunk.read_bytes())
    content[-100] ^= 1
    chunk.write_bytes(content)
    assert [str(error).split(":")[0] for error in verify(tmp_path)] == ["block 2, row 36, head 0"]
