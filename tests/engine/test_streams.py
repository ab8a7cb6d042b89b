"""Whose work goes first on a GPU."""

from __future__ import annotations

import pytest
import torch

from longtake.engine.graphs import CudaRecording
from longtake.engine.streams import going_first


def test_a_cpu_has_no_streams() -> None:
    with going_first(torch.device("cpu")):
        assert torch.ones(1).item() == 1


@pytest.mark.gpu
def test_goes_first_behind_what_was_issued_and_before_what_follows() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.zeros(1 << 24, device=device)
    outer = torch.cuda.current_stream(device)
    for _ in range(20):
        x += 1
    with going_first(device):
        assert torch.cuda.current_stream(device).priority < outer.priority
        for _ in range(10):
            x *= 2
    x -= 1
    assert torch.cuda.current_stream(device) == outer
    assert (x == 20 * 2**10 - 1).all()


@pytest.mark.gpu
def test_recorded_passes_are_as_urgent() -> None:
    device, seen = torch.device("cuda", torch.cuda.current_device()), []
    x = torch.ones(4, device=device)

    def work() -> torch.Tensor:
        seen.append(torch.cuda.current_stream().priority)
        return x + 1

    with going_first(device):
        work()
        assert torch.equal(CudaRecording(work, None).replay(), torch.full((4,), 2.0, device=device))
    assert seen[0] == seen[1] < 0
