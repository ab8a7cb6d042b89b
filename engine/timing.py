"""Where a block's time goes, for benchmarks; costs nothing when nobody asks."""

from __future__ import annotations

import contextlib
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


class EventTimer:
    """Sums seconds by stage: CUDA events on a GPU (read in :meth:`totals`, never in the loop), the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)
        self._seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events[stage].append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[stage] += time.perf_counter() - started

    def totals(self) -> dict[str, float]:
        """Seconds by stage since the last call; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        for stage, pairs in self._events.items():
            self._seconds[stage] += sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        totals = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return totals
