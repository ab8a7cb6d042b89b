"""Hand-overs between streams hold when compute is slow, copies are slow, and nobody synchronises.

On a GPU; on a CPU the same plans over lanes that copy late, so that what is asked for there can be had.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from longtake.offload.cache import CacheBudget, KVCache
from longtake.offload.reading import Reading
from longtake.offload.shape import ModelKVShape
from longtake.offload.verify import verify
from tests.offload.late_lane import LateLane
from tests.offload.payloads import Opaque, open_run, pages_of

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
# Pages of 1 MiB, so that copies take longer than launches.
SHAPE = ModelKVShape(num_layers=6, num_heads=4, codec=Opaque(unit_bytes=1 << 18))
B = SHAPE.block_bytes
NUM_BLOCKS = 12
BUSY_CYCLES = 3_000_000


@pytest.fixture
def device() -> str:
    return "cuda"


@pytest.fixture
def wanted_BLHP(device: str) -> torch.Tensor:
    return torch.stack([torch.stack(pages_of(block, SHAPE)) for block in range(NUM_BLOCKS)]).to(device)


@pytest.fixture(params=[(5, 14, False), (5, 8, True), (NUM_BLOCKS + 1, 4, True), (5, 3, True)])
def cache(
    request: pytest.FixtureRequest, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KVCache]:
    if device == "cpu":
        monkeypatch.setattr("longtake.offload.hosttier.Lane", LateLane)
        monkeypatch.setattr("longtake.offload.devicetier.Lane", LateLane)
    frames, host, disk = request.param
    run = open_run(tmp_path, shape=SHAPE) if disk else None
    budget = CacheBudget(device_bytes=frames * B, host_bytes=host * B)
    with torch.inference_mode():
        cache = KVCache(shape=SHAPE, device=device, budget=budget, run=run)
    yield cache
    cache.close()
    if run is not None:
        run.close()
        assert verify(tmp_path) == []


def be_busy(like: torch.Tensor) -> None:
    """Keep the current stream busy for a while."""
    if like.is_cuda:
        torch.cuda._sleep(BUSY_CYCLES)


def commit_late(cache: KVCache, block: int, wanted_BLHP: torch.Tensor) -> None:
    """Fill the pages long after `complete` has returned."""
    opened = cache.begin_commit(block)
    for layer in range(SHAPE.num_layers):
        be_busy(wanted_BLHP)
        opened.page(layer).copy_(wanted_BLHP[block, layer])
    opened.complete()


def count_wrong(
    reading: Reading, layer: int, plan: Sequence[int], wanted_BLHP: torch.Tensor, wrong: torch.Tensor
) -> None:
    """Compare a layer on the device, long after `pages` has returned; adds to `wrong` without synchronising."""
    pages_GHP, slots_N = reading.pages(layer)
    be_busy(wanted_BLHP)
    for column, block in enumerate(plan):
        page_1HP = pages_GHP.index_select(0, slots_N[column : column + 1])
        wrong += (page_1HP[0] != wanted_BLHP[block, layer]).sum()


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_rollout_with_slow_compute(cache: KVCache, wanted_BLHP: torch.Tensor) -> None:
    wrong = torch.zeros((), dtype=torch.int64, device=wanted_BLHP.device)
    longest = 4 if cache.budget.host_bytes == 3 * B else NUM_BLOCKS
    for block in range(NUM_BLOCKS):
        plan = range(max(0, block - longest), block)
        with cache.prepare(plan) as reading:
            if block + 1 < NUM_BLOCKS:
                cache.schedule([range(max(0, block + 1 - longest), block)])
            for _ in range(2):
                for layer in range(SHAPE.num_layers):
                    count_wrong(reading, layer, plan, wanted_BLHP, wrong)
            commit_late(cache, block, wanted_BLHP)
    cache.flush()
    assert int(wrong) == 0


@pytest.mark.gpu
@torch.inference_mode()
def test_rollout_on_a_stream_of_its_own(cache: KVCache, wanted_BLHP: torch.Tensor) -> None:
    """The stream that prepares and commits need not be the default one, which is idle meanwhile."""
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    longest = 4 if cache.budget.host_bytes == 3 * B else NUM_BLOCKS
    torch.cuda.current_stream().synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for block in range(NUM_BLOCKS):
            plan = range(max(0, block - longest), block)
            with cache.prepare(plan) as reading:
                for layer in range(SHAPE.num_layers):
                    count_wrong(reading, layer, plan, wanted_BLHP, wrong)
                commit_late(cache, block, wanted_BLHP)
        cache.flush()
        assert int(wrong) == 0


@pytest.mark.gpu
@torch.inference_mode()
def test_without_fences_these_tests_fail(monkeypatch: pytest.MonkeyPatch, wanted_BLHP: torch.Tensor) -> None:
    """What they would show if a stream did not wait for another."""
    monkeypatch.setattr("longtake.offload.lanes._EventFence.wait", lambda self: None)
    budget = CacheBudget(device_bytes=5 * B, host_bytes=14 * B)
    cache = KVCache(shape=SHAPE, device="cuda", budget=budget)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for block in range(NUM_BLOCKS):
        with cache.prepare(range(block)) as reading:
            for layer in range(SHAPE.num_layers):
                count_wrong(reading, layer, range(block), wanted_BLHP, wrong)
            commit_late(cache, block, wanted_BLHP)
    assert int(wrong) > 0
    cache.close()


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_random_plans_with_slow_compute(cache: KVCache, wanted_BLHP: torch.Tensor) -> None:
    wrong = torch.zeros((), dtype=torch.int64, device=wanted_BLHP.device)
    chooser = random.Random(5)
    longest = 4 if cache.budget.host_bytes == 3 * B else NUM_BLOCKS - 1
    for block in range(NUM_BLOCKS):
        commit_late(cache, block, wanted_BLHP)
    plans = [chooser.sample(range(NUM_BLOCKS), chooser.randrange(1, longest + 1)) for _ in range(25)]
    for number, plan in enumerate(plans):
        with cache.prepare(plan) as reading:
            cache.schedule(plans[number + 1 : number + 3])
            for layer in (*range(SHAPE.num_layers), *(chooser.randrange(SHAPE.num_layers) for _ in range(3))):
                count_wrong(reading, layer, plan, wanted_BLHP, wrong)
    assert int(wrong) == 0


@pytest.mark.gpu
def test_host_pool_is_pinned_in_place_and_given_back() -> None:
    budget = CacheBudget(num_blocks=2, host_bytes=3 * B)
    for _ in range(3):
        cache = KVCache(shape=SHAPE, device="cuda", budget=budget)
        assert cache._host is not None
        assert cache._host.pool.slabs[2][1].is_pinned()
        assert cache.memory()["host_pool"] < 3 * B + SHAPE.num_layers * 4096
        cache.close()


@pytest.mark.gpu
def test_nothing_is_allocated_after_the_start(cache: KVCache, wanted_BLHP: torch.Tensor) -> None:
    for block in range(4):
        commit_late(cache, block, wanted_BLHP)
        cache.prepare(range(max(0, block - 2), block)).release()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for block in range(4, NUM_BLOCKS):
        commit_late(cache, block, wanted_BLHP)
        cache.prepare(range(block - 2, block)).release()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@torch.inference_mode()
def test_a_new_cache_waits_for_who_had_its_memory(wanted_BLHP: torch.Tensor, tmp_path: Path) -> None:
    """The allocator gives memory anew that work on this stream has still to read."""
    run = open_run(tmp_path, shape=SHAPE)
    writing = KVCache(shape=SHAPE, device="cuda", budget=CacheBudget(num_blocks=1), run=run)
    commit_late(writing, 0, wanted_BLHP)
    writing.close()
    del writing
    former = torch.full((3 * B,), 7, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(500 * BUSY_CYCLES)
    wrong = (former != 7).sum()
    del former
    cache = KVCache(shape=SHAPE, device="cuda", budget=CacheBudget(num_blocks=2), run=run)
    with cache.prepare((0,)) as reading:
        count_wrong(reading, 0, (0,), wanted_BLHP, wrong)
    assert int(wrong) == 0
    cache.close()
    run.close()
