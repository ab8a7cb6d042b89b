"""Copies between tiers, ordered by events: one lane a direction. On a CPU a lane copies at once, every fence is passed.

A fence stands for work queued on a stream. Waiting for one on a stream costs the host nothing; only worker threads,
which have nothing else to do, wait for one on the host. Nothing here waits for the whole device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor


class Fence:
    """Work that is done; the base of fences that are not."""

    def wait(self) -> None:
        """Make the current stream wait, without making the host wait."""

    def synchronize(self) -> None:
        """Make the calling thread wait."""

    def done(self) -> bool:
        """Whether the work is over."""
        return True


DONE = Fence()


class _EventFence(Fence):
    """Work up to an event on a CUDA stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event(blocking=True)  # a thread that waits sleeps
        self._event.record(stream)
        self._device = stream.device

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def synchronize(self) -> None:
        self._event.synchronize()

    def done(self) -> bool:
        return bool(self._event.query())


def mark(device: torch.device) -> Fence:
    """A fence after all that is queued on the current stream."""
    return _EventFence(torch.cuda.current_stream(device)) if device.type == "cuda" else DONE


def thread_start(device: torch.device) -> Callable[[], None]:
    """What a new thread is to call once before its first fence or copy.

    CUDA gives every thread device 0: on the other devices' ranks, its calls would take half a gigabyte there.
    """
    if device.type != "cuda":
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device() if device.index is None else device.index)


class Lane:
    """A queue of copies in one direction, in the order in which they are given. Any thread may give them."""

    def __init__(self, device: torch.device) -> None:
        """Make the lane; its copies begin behind all that is queued on the current stream.

        So memory that PyTorch's allocator has just taken back from that stream's work can be copied to.

        Args:
            device: the accelerator at one end; a CPU needs no stream.
        """
        self.num_bytes = 0
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Fence] = ()) -> Fence:
        """Queue copies.

        Args:
            pairs: (destination, source), same shape and dtype; host sides pinned when the other is a CUDA device.
            after: what must be over before the first copy begins.

        Returns:
            A fence that is passed when all are done.
        """
        if self._stream is None:
            self._count(sum(_copied(target, source) for target, source in pairs))
            return DONE
        with torch.cuda.stream(self._stream):
            for fence in after:
                fence.wait()
            self._count(sum(_copied(target, source) for target, source in pairs))
            return _EventFence(self._stream)

    def synchronize(self) -> None:
        """Make the calling thread wait for all copies given so far; for the end, when memory is given back."""
        if self._stream is not None:
            self._stream.synchronize()

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes += num_bytes


def _copied(target: Tensor, source: Tensor) -> int:
    target.copy_(source, non_blocking=True)
    return source.numel()
