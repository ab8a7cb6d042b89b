"""Timing of single calls, and what every benchmark of kernels records beside its figures."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FLUSH_BYTES = 1 << 30  # many times the L2, and slow enough (0.3 ms) that launches queue up ahead of the device


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds of one call: median, 10th and 90th percentile of `repeats` calls."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class Clock:
    """Times calls one by one.

    Args:
        device: where they run.
        repeats: timed calls, after a fifth as many untimed ones.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.repeats = repeats
        self.flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> Timing:
        for _ in range(max(2, self.repeats // 5)):
            call()
        times = sorted(self._cuda(call) if self.device.type == "cuda" else self._cpu(call))
        tenth = len(times) // 10
        return Timing(
            median_ms=times[len(times) // 2], p10_ms=times[tenth], p90_ms=times[-1 - tenth], repeats=len(times)
        )

    def _cuda(self, call: Callable[[], object]) -> list[float]:
        pairs = []
        for _ in range(self.repeats):
            start, stop = _event(), _event()
            self.flush.zero_()
            start.record()
            call()
            stop.record()
            pairs.append((start, stop))
        torch.cuda.synchronize()
        return [float(start.elapsed_time(stop)) for start, stop in pairs]

    def _cpu(self, call: Callable[[], object]) -> list[float]:
        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times


@contextmanager
def survive(failed: dict[str, str], case: str) -> Iterator[None]:
    """One case of a benchmark: if it fails, its error is printed and noted, and the other cases are measured.

    Args:
        failed: case -> error, added to.
        case: its name.
    """
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        print(f"{case} failed", file=sys.stderr, flush=True)
        failed[case] = f"{type(error).__name__}: {error}"


def setting(commit: str) -> dict[str, str]:
    """What the figures were measured on."""
    found: dict[str, str] = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit}
    if not commit:
        call = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        done = subprocess.run(call, capture_output=True, text=True)
        found["commit"] = done.stdout.strip() or "unknown"
    try:
        import triton  # type: ignore[import-untyped]

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "none"
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
    else:
        found["device"] = platform.processor() or platform.machine()
    return found


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float(((got.float() - want.float()).norm() / want.float().norm()).item())
