"""Ctrl-C and SIGTERM: the first asks for a stop at the next block boundary, the second stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType

EXIT_INTERRUPTED = 3

_STDERR = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopNow(BaseException):
    """The second signal: unwind and leave. No `Exception`, so that nothing on the way takes it for an error."""


class StopSignals:
    """While open, the process answers SIGINT and SIGTERM in three steps.

    The first is remembered (`requested`), so that the block being rendered is finished and checkpointed. The second
    raises `StopNow` in the main thread; what was committed before stays committed. The third leaves without unwinding.
    Opened in another thread it handles nothing, since Python delivers signals to the main thread only.
    """

    def __init__(self) -> None:
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
            _say(f"{name}: finishing the block; once more stops at once")
        elif self._num_signals == 2:
            raise StopNow(name)
        else:
            os._exit(EXIT_INTERRUPTED)


def _say(text: str) -> None:
    """A line on stderr without its buffer, which the handler may have interrupted in the middle of a write."""
    bar = "\n" if os.isatty(_STDERR) else ""
    with contextlib.suppress(OSError):
        os.write(_STDERR, f"{bar}longtake: {text}\n".encode())
