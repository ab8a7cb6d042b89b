"""The cache's device tier: what was committed is what is read, and a full arena says what it needs."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from longtake.kernels.errors import CapacityError, ConfigError
from longtake.offload.cache import CacheBudget, KVCache
from tests.offload.payloads import SHAPE, commit, pages_of


def device_cache(num_blocks: int) -> KVCache:
    return KVCache(shape=SHAPE, device="cpu", budget=CacheBudget(num_blocks=num_blocks))


def test_reads_what_was_committed_in_plan_order() -> None:
    cache = device_cache(4)
    for block in range(4):
        commit(cache, block)
    with cache.prepare((3, 0, 2)) as reading:
        for layer in range(SHAPE.num_layers):
            pages_GHP, slots_N = reading.pages(layer)
            assert slots_N.dtype == torch.int32
            for slot, block in zip(slots_N.tolist(), (3, 0, 2), strict=True):
                assert torch.equal(pages_GHP[slot], pages_of(block)[layer])


def test_empty_plan_has_empty_slots() -> None:
    with device_cache(1).prepare(()) as reading:
        assert reading.pages(0)[1].shape == (0,)


def test_full_arena_names_the_budget_it_needs() -> None:
    cache = device_cache(2)
    for block in range(3):
        commit(cache, block)
    with pytest.raises(CapacityError, match=f"{4 * SHAPE.block_bytes:,} bytes"):
        cache.begin_commit(3)
    assert cache.num_committed == 3


def test_retain_frees_what_nobody_reads_and_waits_for_readers() -> None:
    cache = device_cache(1)
    commit(cache, 0)
    commit(cache, 1)
    reading = cache.prepare((0, 1))
    cache.retain((1,))
    assert torch.equal(reading.pages(1)[0][reading.pages(1)[1][0]], pages_of(0)[1])
    reading.release()
    commit(cache, 2)
    with pytest.raises(CapacityError, match="block 0 left"):
        cache.prepare((0,))
    cache.prepare((1, 2)).release()


def test_abort_leaves_no_trace() -> None:
    cache = device_cache(1)
    commit(cache, 0)
    opened = cache.begin_commit(1)
    opened.page(0).fill_(7)
    opened.abort()
    opened.abort()
    assert cache.num_committed == 1
    commit(cache, 1)
    cache.prepare((0, 1)).release()


def test_misuse_is_refused() -> None:
    cache = device_cache(2)
    with pytest.raises(ConfigError, match="block 0 is next"):
        cache.begin_commit(1)
    with pytest.raises(ConfigError, match="not committed"):
        cache.prepare((0,))
    opened = cache.begin_commit(0)
    with pytest.raises(ConfigError, match="still being committed"):
        cache.begin_commit(1)
    opened.complete()
    with pytest.raises(ConfigError, match="has ended"):
        opened.page(0)
    reading = cache.prepare((0,))
    reading.release()
    with pytest.raises(ConfigError, match="released"):
        reading.pages(0)


def test_memory_names_every_byte() -> None:
    cache = device_cache(2)
    assert cache.memory() == {"device_arena": 3 * SHAPE.block_bytes, "device_slot_tables": 0}
    commit(cache, 0)
    reading = cache.prepare((0,))
    assert cache.memory()["device_slot_tables"] == 4 * SHAPE.num_layers
    reading.release()
    assert cache.memory()["device_slot_tables"] == 0


def test_budget_bounds_the_arena() -> None:
    both = CacheBudget(device_bytes=5 * SHAPE.block_bytes + 1, num_blocks=99)
    assert both.num_frames(SHAPE) == 5
    assert CacheBudget(device_bytes=99 * SHAPE.block_bytes, num_blocks=4).num_frames(SHAPE) == 5
    with pytest.raises(CapacityError, match="holds no block"):
        CacheBudget(device_bytes=1).num_frames(SHAPE)
    with pytest.raises(ConfigError):
        CacheBudget().num_frames(SHAPE)


def test_a_released_reading_leaves_nothing_behind() -> None:
    cache = device_cache(2)
    commit(cache, 0)
    reading = cache.prepare((0,))
    pages = weakref.ref(reading)
    gc.disable()  # what is freed, is so by itself
    try:
        reading.release()
        del reading
        assert pages() is None
    finally:
        gc.enable()
