"""Any sequence of commits, plans, announcements, crashes and reopenings, against a dict."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from longtake.kernels.errors import CapacityError, StorageError
from longtake.offload.cache import CacheBudget, KVCache
from longtake.offload.reading import Reading
from longtake.offload.shape import ModelKVShape
from longtake.offload.verify import verify
from tests.offload.faults import Unsynced
from tests.offload.late_lane import LateLane
from tests.offload.payloads import SHAPE, UNEVEN, open_run

MOST_BLOCKS = 24
PLANS = st.lists(st.integers(0, MOST_BLOCKS - 1), max_size=12, unique=True)


class CacheMachine(RuleBasedStateMachine):
    """One cache over a disk; `written` is what it must give back."""

    cache: KVCache
    reading: Reading | None = None

    @initialize(device=st.integers(3, 9), host=st.sampled_from([2, 3, 6, 9]), shape=st.sampled_from([SHAPE, UNEVEN]))
    def open(self, device: int, host: int, shape: ModelKVShape) -> None:
        self.shape = shape
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.budget = CacheBudget(device_bytes=device * shape.block_bytes, host_bytes=host * shape.block_bytes)
        self.written: dict[int, list[torch.Tensor]] = {}
        self.dropped: set[int] = set()
        self.num_made = 0
        self._reopen()

    def _reopen(self) -> None:
        self.run_directory = open_run(self.path, Unsynced(), self.shape)
        self.cache = KVCache(shape=self.shape, device="cpu", budget=self.budget, run=self.run_directory)

    def _release(self) -> None:
        if self.reading is not None:
            self.reading.release()
            self.reading = None

    @precondition(lambda self: len(self.written) < MOST_BLOCKS)
    @rule(abort=st.booleans())
    def commit(self, abort: bool) -> None:
        block = len(self.written)
        try:
            commit = self.cache.begin_commit(block)
        except CapacityError:
            assert self.reading is not None, "only a plan being read may keep a commit out"
            self._release()
            commit = self.cache.begin_commit(block)
        # Other bytes each time, so that what a crash lost can't be mistaken for what replaced it.
        self.num_made += 1
        generator = torch.Generator().manual_seed(self.num_made)
        pages = []
        for layer in range(self.shape.num_layers):
            page_HP = commit.page(layer)
            pages.append(torch.randint(0, 256, page_HP.shape, generator=generator, dtype=torch.uint8))
            page_HP.copy_(pages[-1])
        if abort:
            commit.abort()
        else:
            commit.complete()
            self.written[block] = pages

    @rule(plan=PLANS)
    def prepare(self, plan: list[int]) -> None:
        self._release()
        plan = [block for block in plan if block in self.written and block not in self.dropped]
        try:
            self.reading = self.cache.prepare(plan)
        except CapacityError:
            assert len(plan) > self.cache.arena.num_frames - 1
            assert self.cache._device.table.num_pinned == 0

    @precondition(lambda self: self.reading is not None)
    @rule(layers=st.lists(st.integers(0, SHAPE.num_layers - 1), max_size=12))
    def read(self, layers: list[int]) -> None:
        assert self.reading is not None
        for layer in layers:
            pages_GHP, slots_N = self.reading.pages(layer)
            for slot, block in zip(slots_N.tolist(), self.reading.blocks, strict=True):
                assert torch.equal(pages_GHP[slot], self.written[block][layer]), (block, layer)

    @rule(plans=st.lists(PLANS, max_size=3))
    def schedule(self, plans: list[list[int]]) -> None:
        self.cache.schedule(plans)

    @rule(blocks=st.frozensets(st.integers(0, MOST_BLOCKS - 1)))
    def retain(self, blocks: frozenset[int]) -> None:
        self.cache.retain(blocks)

    @rule(blocks=st.frozensets(st.integers(0, MOST_BLOCKS - 1), max_size=6))
    def drop(self, blocks: frozenset[int]) -> None:
        self._release()
        doomed = {block for block in blocks if block < self.cache.durable_blocks}
        self.cache.drop(doomed)
        self.dropped |= doomed
        for block in doomed:
            with pytest.raises(StorageError, match="deleted from the disk"):
                self.cache.prepare((block,))

    @rule()
    def flush(self) -> None:
        self.cache.flush()
        assert self.cache.durable_blocks == len(self.written)

    @rule()
    def crash(self) -> None:
        self._release()
        durable = self.cache.durable_blocks
        self.cache.close(drain=False)
        self.run_directory.close(orderly=False)
        self._reopen()
        assert durable <= self.cache.num_committed <= len(self.written)
        self.written = {block: kept for block, kept in self.written.items() if block < self.cache.num_committed}
        assert self.dropped == {block for block in self.written if not self.run_directory.keeps(block)}

    @rule()
    def end_and_reopen(self) -> None:
        self._release()
        self.cache.close()
        self.run_directory.close()
        assert verify(self.path) == []
        self._reopen()
        assert self.cache.num_committed == len(self.written)

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "written"):
            assert self.cache.num_committed == len(self.written)

    def teardown(self) -> None:
        if hasattr(self, "written"):
            self._release()
            for block in self.written.keys() - self.dropped:
                with self.cache.prepare((block,)) as reading:
                    for layer in range(self.shape.num_layers):
                        pages_GHP, slots_N = reading.pages(layer)
                        assert torch.equal(pages_GHP[slots_N[0]], self.written[block][layer])
            self.cache.close()
            self.run_directory.close()
            self.folder.cleanup()


LIMITS = settings(max_examples=50, stateful_step_count=40)


def test_copies_at_once() -> None:
    run_state_machine_as_test(CacheMachine, settings=LIMITS)


def test_late_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtake.offload.hosttier.Lane", LateLane)
    monkeypatch.setattr("longtake.offload.devicetier.Lane", LateLane)
    run_state_machine_as_test(CacheMachine, settings=LIMITS)
