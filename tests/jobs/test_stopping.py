from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from longtake.jobs.stopping import StopNow, StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_is_remembered_second_stops(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StopNow), StopSignals() as signals:
        assert not signals.requested()
        os.kill(os.getpid(), number)
        assert signals.requested()
        assert capfd.readouterr().err == f"longtake: {number.name}: finishing the block; once more stops at once\n"
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_the_third_leaves_at_once() -> None:
    script = """
import os, signal
from longtake.jobs.stopping import StopNow, StopSignals
with StopSignals():
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except StopNow:
        os.kill(os.getpid(), signal.SIGTERM)
print("still here")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (3, "")


def test_another_thread_may_open_it() -> None:
    seen: list[bool] = []

    def work() -> None:
        with StopSignals() as signals:
            seen.append(signals.requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_stop_now_is_no_exception() -> None:
    assert not issubclass(StopNow, Exception)
