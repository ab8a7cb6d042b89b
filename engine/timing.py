"""Where a block's time goes, for metrics and benchmarks; costs nothing when nobody asks."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeAlias

import torch

StageTimer: TypeAlias = Callable[[str], AbstractContextManager[None]]

_NOTHING = contextlib.nullcontext()


def NO_TIMER(stage: str) -> AbstractContextManager[None]:
    """A timer that times nothing."""
    return _NOTHING


def await_device(device: torch.device) -> None:
    """Wait until all that was issued to the device is done; for benchmarks."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StageClock:
    """Seconds by stage: the clock on a CPU, events on CUDA. Never waits for the device; any thread may time a stage.

    On CUDA a stage counts once the device has passed its end, which a later look finds, on whatever stream it runs;
    who wants all of them (benchmarks) lets the device finish before looking.

    Args:
        device: what the work is issued to.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._lock = threading.Lock()
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            with self._lock:
                self._pending.append((stage, begin, end))
        else:
            started = time.perf_counter()
            yield
            with self._lock:
                self._seconds[stage] += time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """Seconds by stage so far."""
        with self._lock:
            pending, self._pending = self._pending, []
            for stage, begin, end in pending:
                if end.query():
                    self._seconds[stage] += begin.elapsed_time(end) / 1000
                else:
                    self._pending.append((stage, begin, end))
            return dict(self._seconds)
