"""One conformance suite over every arrangement of tiers: what was committed is what is read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from longtake.kernels.errors import CapacityError
from longtake.offload.cache import CacheBudget, KVCache
from longtake.offload.chunkfiles import DiskIO
from longtake.offload.files import FileOps
from longtake.offload.lanes import Lane
from longtake.offload.run import RunDirectory
from tests.offload.aio import PlainHandle
from tests.offload.late_lane import LateLane
from tests.offload.payloads import SHAPE, check_pages, check_passes, commit, open_run

NUM_BLOCKS = 14
B = SHAPE.block_bytes

# name: device frames, host frames (None: staging only), disk, longest plan
TIERS: dict[str, tuple[int, int | None, bool, int]] = {
    "device": (NUM_BLOCKS + 1, None, False, NUM_BLOCKS),
    "device+host": (8, NUM_BLOCKS + 1, False, NUM_BLOCKS),
    "host streamed": (5, NUM_BLOCKS + 1, False, NUM_BLOCKS),
    "device+disk": (NUM_BLOCKS + 1, None, True, NUM_BLOCKS),
    "all": (5, 8, True, NUM_BLOCKS),
    "all, aio": (5, 8, True, NUM_BLOCKS),
    "small host": (6, 3, True, 11),
    "least": (5, 2, True, 7),
    "least, aio": (5, 2, True, 7),
}

LATE_S = 0.002
LANES: dict[str, tuple[type[Lane] | Callable[[torch.device], Lane], type[Lane] | Callable[[torch.device], Lane]]] = {
    "at once": (Lane, Lane),
    "late": (LateLane, LateLane),
    "late down": (partial(LateLane, job_delay_s=LATE_S), LateLane),
    "late up": (LateLane, partial(LateLane, job_delay_s=LATE_S)),
}


@pytest.fixture(params=list(LANES), autouse=True)
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that are done at once, as on a CPU, and ones that come late, as on a stream; one direction later still."""
    down, up = LANES[request.param]
    monkeypatch.setattr("longtake.offload.hosttier.Lane", down)
    monkeypatch.setattr("longtake.offload.devicetier.Lane", up)


@pytest.fixture(params=list(TIERS))
def tiers(request: pytest.FixtureRequest) -> tuple[int, int | None, bool, int]:
    return TIERS[request.param]


@pytest.fixture
def longest(tiers: tuple[int, int | None, bool, int]) -> int:
    return tiers[3]


@pytest.fixture
def cache(
    request: pytest.FixtureRequest, tiers: tuple[int, int | None, bool, int], tmp_path: Path
) -> Iterator[KVCache]:
    device, host, disk, _ = tiers
    aio = request.node.callspec.params["tiers"].endswith("aio")
    run: RunDirectory | None = None
    if disk:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("longtake.offload.deepnvme.load_op", lambda build: lambda: PlainHandle(FileOps()))
            wish = DiskIO.AUTO if aio else DiskIO.SYSTEM
            run = RunDirectory(tmp_path, shape=SHAPE, config_hash="c", disk_io=wish)
        if aio and run.store.files.name == "system":
            pytest.skip("no direct I/O in the folder for temporary files")
    budget = CacheBudget(device_bytes=device * B, host_bytes=None if host is None else host * B)
    cache = KVCache(shape=SHAPE, device="cpu", budget=budget, run=run)
    yield cache
    cache.close()
    if run is not None:
        run.close()


def test_full_history_grows_past_the_device(cache: KVCache, longest: int) -> None:
    for block in range(NUM_BLOCKS):
        plan = range(max(0, block - longest), block)
        assert check_passes(cache, plan) == (len(plan) > cache.arena.num_frames - 1)
        commit(cache, block)
    cache.flush()
    if cache.durable_blocks:
        assert cache.durable_blocks == NUM_BLOCKS


def test_window_with_sink_and_schedule(cache: KVCache) -> None:
    def plan(block: int) -> tuple[int, ...]:
        return (0, *range(max(1, block - 2), block)) if block else ()

    for block in range(NUM_BLOCKS):
        with cache.prepare(plan(block)) as reading:
            cache.schedule([plan(block + 1)[:-1], plan(block + 2)[:-2]])
            for _ in range(2):
                for layer in range(SHAPE.num_layers):
                    check_pages(reading, layer, plan(block))
            commit(cache, block)
            check_pages(reading, 0, plan(block))
        cache.retain(plan(block + 1))


def test_random_plans_in_any_order_of_layers(cache: KVCache, longest: int) -> None:
    chooser = random.Random(0)
    for block in range(NUM_BLOCKS):
        commit(cache, block)
    upcoming = [tuple(chooser.sample(range(NUM_BLOCKS), chooser.randrange(1, longest + 1))) for _ in range(20)]
    for number, plan in enumerate(upcoming):
        with cache.prepare(plan) as reading:
            cache.schedule(upcoming[number + 1 : number + 3])
            for _ in range(6):
                layer = chooser.randrange(SHAPE.num_layers)
                check_pages(reading, layer, plan)
                check_pages(reading, layer, plan)


def test_what_was_just_committed_leaves_and_comes_back(cache: KVCache) -> None:
    for block in range(NUM_BLOCKS):
        commit(cache, block)
        check_passes(cache, (block, block // 2), 1)
    for block in range(NUM_BLOCKS):
        check_passes(cache, (block, (5 * block) % NUM_BLOCKS), 1)


def test_nothing_stays_pinned_and_nothing_grows(cache: KVCache) -> None:
    for block in range(NUM_BLOCKS):
        check_passes(cache, range(max(0, block - 3), block), 1)
        commit(cache, block)
    cache.flush()
    before = cache.memory()
    assert sum(before.values()) > 0
    for _ in range(5):
        check_passes(cache, range(0, NUM_BLOCKS, 4), 1)
    assert cache.memory() == before
    assert cache._device.table.num_pinned == 0
    assert cache._host is None or cache._host.table.num_pinned == 0


def test_abort_in_the_middle(cache: KVCache) -> None:
    for block in range(3):
        commit(cache, block)
    opened = cache.begin_commit(3)
    opened.page(0).fill_(1)
    opened.abort()
    check_passes(cache, (0, 1, 2))
    commit(cache, 3)
    check_passes(cache, (3, 2, 1, 0))


def test_full_tiers_without_a_disk_say_what_they_need() -> None:
    budget = CacheBudget(device_bytes=4 * B, host_bytes=6 * B)
    cache = KVCache(shape=SHAPE, device="cpu", budget=budget)
    for block in range(6):
        commit(cache, block)
    with pytest.raises(CapacityError, match="host tier is full: 6 blocks"):
        cache.begin_commit(6)
    check_passes(cache, (0, 5))
    cache.retain((4, 5))
    commit(cache, 6)
    check_passes(cache, (4, 5, 6))
    cache.close()


def test_a_plan_beyond_all_memory_streams_from_the_disk(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    budget = CacheBudget(device_bytes=13 * B, host_bytes=12 * B)
    cache = KVCache(shape=SHAPE, device="cpu", budget=budget, run=run)
    for block in range(24):
        commit(cache, block)
    assert check_passes(cache, range(15), 3)
    assert check_passes(cache, range(24)[::-1], 3)
    cache.close()
    run.close()


def test_a_plan_that_no_ring_can_stream_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    budget = CacheBudget(device_bytes=7 * B, host_bytes=2 * B)
    cache = KVCache(shape=SHAPE, device="cpu", budget=budget, run=run)
    for block in range(30):
        commit(cache, block)
    with pytest.raises(CapacityError, match="device budget"):
        cache.prepare(range(30))
    with pytest.raises(CapacityError, match="host budget"):
        cache.prepare(range(12))
    cache.flush()
    assert cache._device.table.num_pinned == 0 and cache._host is not None and cache._host.table.num_pinned == 0
    check_passes(cache, (7, 2))
    commit(cache, 30)
    cache.close()
    run.close()


def test_streamed_part_is_only_what_does_not_fit() -> None:
    budget = CacheBudget(device_bytes=9 * B, host_bytes=20 * B)
    cache = KVCache(shape=SHAPE, device="cpu", budget=budget)
    for block in range(10):
        commit(cache, block)
    with cache.prepare(range(10)) as reading:
        before = cache.stats().up_bytes
        for _ in range(4):
            for layer in range(SHAPE.num_layers):
                check_pages(reading, layer, range(10))
        pages = (cache.stats().up_bytes - before) / SHAPE.page_bytes(0)
    assert pages <= 4 * SHAPE.num_layers * 4  # of 10 blocks, 4 through the ring and 4 resident


def test_what_is_counted_of_tiers_and_disk(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    budget = CacheBudget(device_bytes=5 * B, host_bytes=4 * B, disk_bytes=40 * B)
    cache = KVCache(shape=SHAPE, device="cpu", budget=budget, run=run)
    for block in range(10):
        commit(cache, block)
    cache.flush()
    uses = cache.tiers()
    assert (uses["disk"].used_bytes, uses["disk"].budget_bytes) == (10 * B, 40 * B)
    assert (uses["device"].budget_bytes, uses["host"].budget_bytes) == (5 * B, 4 * B)
    assert 0 < uses["device"].used_bytes <= 5 * B
    assert 0 < uses["host"].used_bytes <= 4 * B
    before = cache.stats()
    assert (before.written_bytes, before.read_bytes, before.num_misses) == (10 * B, 0, 0)
    on_memory = [
        block for block in range(10) if block in cache._device.table or (cache._host and cache._host.holds(block))
    ]
    with cache.prepare([0, 1, 2]) as reading:
        check_pages(reading, 0, [0, 1, 2])
    after = cache.stats()
    misses = sum(block not in on_memory for block in (0, 1, 2))
    assert misses, "the oldest blocks left memory"
    assert (after.num_misses, after.num_hits - before.num_hits) == (misses, 3 - misses)
    assert after.read_bytes >= misses * B
    with cache.prepare([0, 1, 2]):
        assert cache.stats().num_misses == misses
    cache.close()
    run.close()
