"""A lane on a CPU that copies late, in a thread of its own, as a copy stream does: wrong order shows as wrong bytes."""

from __future__ import annotations

import queue
import random
import threading
import time
import weakref
from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from longtake.offload.lanes import Fence, Lane


class LateFence(Fence):
    """Passed when the lane has copied; compute on a CPU has no stream, so its thread waits."""

    def __init__(self) -> None:
        self._passed = threading.Event()

    def passed(self) -> None:
        self._passed.set()

    def wait(self) -> None:
        assert self._passed.wait(120), "a copy waits for something that never happens"

    def synchronize(self) -> None:
        self.wait()

    def done(self) -> bool:
        return self._passed.is_set()


_Job: TypeAlias = tuple[list[tuple[Tensor, Tensor]], list[Fence], LateFence]


class LateLane(Lane):
    """Copies in order, each some time after it was given.

    Args:
        device: as of a Lane.
        job_delay_s: time before each set of copies; besides, single copies take up to a millisecond.
    """

    def __init__(self, device: torch.device, job_delay_s: float = 0.0) -> None:
        super().__init__(device)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        weakref.finalize(self, self._jobs.put, None)
        threading.Thread(target=_work, args=(self._jobs, job_delay_s), daemon=True).start()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Fence] = ()) -> Fence:
        job: _Job = (list(pairs), list(after), LateFence())
        self._jobs.put(job)
        self._count(sum(source.numel() for _, source in job[0]))
        return job[2]

    def synchronize(self) -> None:
        self.copy(()).synchronize()


def _work(jobs: queue.SimpleQueue[_Job | None], job_delay_s: float) -> None:
    """Until the lane is gone."""
    delays = random.Random(1)
    while (job := jobs.get()) is not None:
        pairs, after, fence = job
        for earlier in after:
            earlier.synchronize()
        time.sleep(job_delay_s)
        for target, source in pairs:
            if delays.random() < 0.2:
                time.sleep(delays.random() * 0.001)
            target.copy_(source)
        fence.passed()
