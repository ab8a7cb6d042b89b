"""Pinning the host pool, with a CUDA runtime that refuses."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from longtake.kernels.errors import CapacityError
from longtake.offload.host import HostPool
from tests.offload.payloads import SHAPE


class Runtime:
    """Pins so many ranges; its last error is told again by the next launch."""

    def __init__(self, most: int) -> None:
        self.most, self.pinned, self.last_error = most, set[int](), 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if len(self.pinned) == self.most:
            self.last_error = 2
            return 2
        self.pinned.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.pinned.remove(address)
        return 0

    def check(self, error: int) -> None:
        if error:
            raise RuntimeError("CUDA error: out of memory (2)")

    def launch(self, *size: int, **options: Any) -> None:
        error, self.last_error = self.last_error, 0
        self.check(error)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime(most=SHAPE.num_layers - 1)
    monkeypatch.setattr("longtake.offload.host.near", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", runtime.check)
    monkeypatch.setattr(torch, "ones", runtime.launch)
    return runtime


def test_a_refusal_leaves_nothing_pinned_and_no_error_for_others(runtime: Runtime) -> None:
    with pytest.raises(CapacityError, match=r"refuses to pin .* lower the cache's host budget"):
        HostPool(shape=SHAPE, num_frames=2, device=torch.device("cuda"))
    assert not runtime.pinned and not runtime.last_error


def test_a_pool_is_pinned_whole_and_given_back(runtime: Runtime) -> None:
    runtime.most = SHAPE.num_layers
    pool = HostPool(shape=SHAPE, num_frames=2, device=torch.device("cuda"))
    assert len(runtime.pinned) == SHAPE.num_layers
    pool.close()
    pool.close()
    assert not runtime.pinned
