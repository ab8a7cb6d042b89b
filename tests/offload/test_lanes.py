"""Threads that copy, or wait for copies, do so on their rank's device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longtake.offload.cache import CacheBudget, KVCache
from longtake.offload.lanes import thread_start
from tests.offload.payloads import SHAPE, commit, open_run


def test_a_thread_starts_on_the_rank_s_device(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for name in ("cpu", "cuda:1", "cuda"):
        thread_start(torch.device(name))()
    assert chosen == [1, 3]


def test_every_thread_of_a_cache_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: set[str] = set()

    def noting(device: torch.device) -> Callable[[], None]:
        return lambda: started.add(threading.current_thread().name)

    monkeypatch.setattr("longtake.offload.hosttier.thread_start", noting)
    run = open_run(tmp_path)
    cache = KVCache(shape=SHAPE, device="cpu", budget=CacheBudget(num_blocks=2), run=run, num_readers=2)
    commit(cache, 0)
    cache.close()
    run.close()
    assert started >= {"longtake-read-0", "longtake-read-1", "longtake-journal", "longtake-write_0"}
