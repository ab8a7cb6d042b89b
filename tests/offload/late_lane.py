"""A lane on a CPU that copies late, in a thread of its own, as a copy stream does: wrong order shows as wrong bytes."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterable

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
        assert self._passed.wait(30), "a copy waits for something that never happens"

    def synchronize(self) -> None:
        self.wait()

    def done(self) -> bool:
        return self._passed.is_set()


class LateLane(Lane):
    """Copies in order, each some time after it was given.

    Args:
        device: as of a Lane.
        job_delay_s: time before each set of copies; besides, single copies take up to a millisecond.
    """

    def __init__(self, device: torch.device, job_delay_s: float = 0.0) -> None:
        super().__init__(device)
        self._job_delay_s = job_delay_s
        self._jobs: queue.SimpleQueue[tuple[list[tuple[Tensor, Tensor]], list[Fence], LateFence]] = queue.SimpleQueue()
        self._delays = random.Random(1)
        threading.Thread(target=self._work, daemon=True).start()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Fence] = ()) -> Fence:
        fence = LateFence()
        self._jobs.put((list(pairs), list(after), fence))
        return fence

    def synchronize(self) -> None:
        self.copy(()).synchronize()

    def _work(self) -> None:
        while True:
            pairs, after, fence = self._jobs.get()
            for earlier in after:
                earlier.synchronize()
            time.sleep(self._job_delay_s)
            for target, source in pairs:
                if self._delays.random() < 0.2:
                    time.sleep(self._delays.random() * 0.001)
                target.copy_(source)
                self.num_bytes += source.numel()
            fence.passed()
