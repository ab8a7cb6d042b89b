"""Which of a GPU's work goes first: the rollout's. The decoder works in its gaps.

Both can keep the GPU busy, and a gang's ranks wait for one another several times a layer: work of the decoder that
holds up one of them holds up all. On a stream of higher priority a rollout's kernels start before the decoder's that
wait as well (CUDA C++ Programming Guide, "Stream Priorities"); recorded passes keep the priority that they were
recorded with.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_FIRST = -1  # lower numbers go first; 0 is what other streams have


@functools.cache
def _first_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=_FIRST)


@contextmanager
def going_first(device: torch.device) -> Iterator[None]:
    """What this thread issues to the device inside goes before what other threads do; nothing on a CPU.

    It begins behind what the thread has issued before, and what the thread issues afterwards begins behind it.
    """
    if device.type != "cuda":
        yield
        return
    stream, outer = _first_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)
