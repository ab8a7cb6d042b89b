"""Where a running shot's time goes."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from longtake.engine.timing import StageClock


def test_stages_of_all_threads_add_up() -> None:
    clock = StageClock(torch.device("cpu"))

    def decode() -> None:
        with clock("decode"):
            time.sleep(0.02)

    thread = threading.Thread(target=decode)
    thread.start()
    for _ in range(2):
        with clock("denoise"):
            time.sleep(0.01)
    thread.join()
    seconds = clock.seconds()
    assert set(seconds) == {"decode", "denoise"}
    assert all(0.02 <= value < 2 for value in seconds.values())
    assert clock.seconds() == seconds, "totals, not what is new"


@pytest.mark.gpu
def test_a_stage_counts_once_the_device_has_passed_it() -> None:
    device = torch.device("cuda")
    clock = StageClock(device)
    with clock("denoise"):
        torch.cuda._sleep(50_000_000)
    early = clock.seconds()
    torch.cuda.synchronize()
    assert early == {}
    assert clock.seconds()["denoise"] > 0.001
