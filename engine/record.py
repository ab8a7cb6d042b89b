"""What every benchmark writes beside its figures: hardware, versions, commit, and how figures are summarised."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "zarr", "av", "numpy", "ray", "deepspeed")


def environment() -> dict[str, Any]:
    """Hardware and versions of this machine, and the commit of a source checkout (None elsewhere)."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append({"name": properties.name, "memory_bytes": properties.total_memory})
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "num_threads": torch.get_num_threads(),
        "devices": devices,
        "versions": versions,
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and spread (10th and 90th percentile) of samples, and how many there are."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
        "samples": len(ordered),
    }


def write(path: Path, name: str, config: dict[str, Any], results: Any) -> None:
    """Write one benchmark's JSON; a file that is there is replaced in one step.

    Args:
        path: of the file; its folder is made.
        name: of the benchmark.
        config: what was run.
        results: what was measured; units are in the names.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": name, "environment": environment(), "config": config, "results": results}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


def _commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
