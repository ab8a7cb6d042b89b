"""Ctrl-C and SIGTERM: the first asks for a stop at the next block boundary, the second stops at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

EXIT_INTERRUPTED = 3

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopNow(BaseException):
    """The second signal: unwind and leave. No `Exception`, so that nothing on the way takes it for an error."""


class StopSignals:
    """While open, the process answers SIGINT and SIGTERM in three steps.

    The first is remembered (`requested`), so that the block being rendered is finished and checkpointed. The second
    raises `StopNow` in the main thread; what was committed before stays committed. The third leaves without unwinding.
    Opened in another thread it handles nothing, since Python delivers signals to the main thread only.

    Args:
        notify: is told the signal's name when the first one comes; runs in the signal handler, so it must be short.
    """

    def __init__(self, notify: Callable[[str], None] = lambda name: None) -> None:
        self._notify = notify
        self._num_signals = 0
        self._previous: dict[signal.Signals, object] = {}

    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self._num_signals > 0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]  # what signal.signal returned, it accepts
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        name = signal.Signals(number).name
        if self._num_signals == 1:
            self._notify(name)
        elif self._num_signals == 2:
            raise StopNow(name)
        else:
            sys.stderr.flush()
            os._exit(EXIT_INTERRUPTED)
