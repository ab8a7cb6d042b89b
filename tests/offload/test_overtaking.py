"""Frames that are given away while a late copy still reads or writes them."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest

from longtake.offload.cache import CacheBudget, KVCache
from tests.offload.late_lane import LateLane
from tests.offload.payloads import SHAPE, check_passes, commit, open_run

B = SHAPE.block_bytes


@pytest.mark.parametrize("device", [3, 7])
@pytest.mark.parametrize("host", [2, 3])
def test_a_prefetch_overtaken_by_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: int, host: int
) -> None:
    """With 3 device frames the commits want the frame that the prefetch is filling, with 7 the one it reads from."""
    run = open_run(tmp_path)
    cache = KVCache(shape=SHAPE, device="cpu", budget=CacheBudget(num_blocks=2), run=run)
    for block in range(6):
        commit(cache, block)
    cache.close()
    monkeypatch.setattr("longtake.offload.hosttier.Lane", LateLane)
    monkeypatch.setattr("longtake.offload.devicetier.Lane", partial(LateLane, job_delay_s=0.05))
    budget = CacheBudget(device_bytes=device * B, host_bytes=host * B)
    cache = KVCache(shape=SHAPE, device="cpu", budget=budget, run=run)
    cache.schedule([(0,)])
    while 0 not in cache._device.table:
        time.sleep(0.0005)
    cache.schedule([])
    for block in (6, 7, 8):
        commit(cache, block)
    time.sleep(0.1)
    for block in (8, 7, 6, 0):
        check_passes(cache, (block,), 1)
    cache.close()
    run.close()
