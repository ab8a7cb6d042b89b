"""A lease held: a thread that keeps telling the director where the shot is, and a `stop` for the renderer to ask.

A holder may go on for less time than the director waits before it gives the shot away, counted from when its last
answered message was sent. So a gang cut off from the director stops by itself first, and a process that slept through
its lease finds at its next block that it is over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from longtake.jobs.orders import Gang, Leave, Order, Verdict
from longtake.jobs.states import Failure, Lease, Progress

_SAFE_PART = 0.8
_BEATS = 5
_MIN_INTERVAL_S = 0.2


class DirectorClient(Protocol):
    """How a gang reaches the director. Calls may raise ConnectionError while it is restarting."""

    def next_order(self, gang: Gang) -> Order | Leave | None:
        """Waits a while for a task before it answers None."""

    def heartbeat(self, lease: Lease, progress: Progress) -> Verdict: ...
    def stopped(self, lease: Lease) -> bool: ...
    def finish(self, lease: Lease, video: str | None) -> bool: ...
    def fail(self, lease: Lease, failure: Failure) -> bool: ...


class Hold:
    """A lease while it is worked on. A context manager; `report` and `stop` are called by the renderer's thread.

    Args:
        client: used by this object's thread only, until it is closed.
        lease: what is held.
        lease_s: how long the director waits for a silent holder.
        since: by ``clock``, no later than the lease was granted.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        client: DirectorClient,
        lease: Lease,
        lease_s: float,
        *,
        since: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._lease, self._lease_s, self._clock = client, lease, lease_s, clock
        self._deadline = since + _SAFE_PART * lease_s
        self._progress = Progress()
        self._verdict = Verdict.GO
        self._news, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease-{lease.task}", daemon=True)

    def report(self, progress: Progress) -> None:
        """Tell the director soon where the shot is."""
        self._progress = progress
        self._news.set()

    def stop(self) -> bool:
        """Whether to stop at this block boundary: asked to, lost, or out of touch for too long."""
        return self._verdict is not Verdict.GO or self._clock() > self._deadline

    @property
    def lost(self) -> bool:
        """Whether nothing may be written any more."""
        return self._verdict is Verdict.LOST or self._clock() > self._deadline

    def __enter__(self) -> Hold:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._news.set()
        self._thread.join()

    def _beat(self) -> None:
        interval_s = self._lease_s / _BEATS
        while True:
            sent = self._clock()
            try:
                verdict = self._client.heartbeat(self._lease, self._progress)
                self._deadline = sent + _SAFE_PART * self._lease_s
                if verdict is not Verdict.GO:
                    self._verdict = verdict
            except ConnectionError:
                pass  # it may be restarting; the deadline decides
            if self._closed.is_set() or self._verdict is Verdict.LOST:
                return
            self._closed.wait(min(_MIN_INTERVAL_S, interval_s))
            self._news.wait(interval_s)
            self._news.clear()
