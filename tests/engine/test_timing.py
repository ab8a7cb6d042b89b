"""Where a running shot's time goes."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from longtake.engine.timing import StageClock


def test_stages_of_all_threads_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StageClock(torch.device("cpu"))

    def stage(name: str, seconds: float) -> None:
        with clock(name):
            now[0] += seconds

    thread = threading.Thread(target=stage, args=("decode", 0.5))
    thread.start()
    thread.join()
    stage("denoise", 0.25)
    stage("denoise", 1.0)
    assert clock.seconds() == {"decode": 0.5, "denoise": 1.25}
    assert clock.seconds() == {"decode": 0.5, "denoise": 1.25}, "totals, not what is new"


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
