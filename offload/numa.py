"""Memory near a device: on a host of several nodes, pages come from the node of the CPU that first touches them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

_DEVICES = Path("/sys/bus/pci/devices")


def parse_cpus(text: str) -> set[int]:
    """CPU numbers from the kernel's list format, such as `0-3,8,10-11`."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def local_cpus(device: torch.device) -> set[int]:
    """CPUs on the node of a CUDA device; empty where the system does not say."""
    properties = torch.cuda.get_device_properties(device)
    domain, bus, number = (getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    if domain is None or bus is None or number is None:  # a PyTorch that does not say
        return set()
    try:
        address = f"{domain:04x}:{bus:02x}:{number:02x}.0"
        return parse_cpus((_DEVICES / address / "local_cpulist").read_text())
    except (OSError, ValueError):
        return set()


@contextlib.contextmanager
def near(device: torch.device) -> Iterator[None]:
    """Run the calling thread on CPUs of a CUDA device's node; elsewhere, or where that is forbidden, as it was."""
    before = os.sched_getaffinity(0)
    wanted = local_cpus(device) & before
    if wanted:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        if wanted:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, before)
