"""Device memory by name, against what PyTorch's allocator has given out: the benchmarks' ledger.

What a rollout holds between blocks it names itself. Beside that the allocator holds what nobody asked for by name::

    workspaces          of cuBLAS: one a thread and stream that multiplied matrices (32 MiB on Hopper)
    attention_partials  results of parts of the keys, which FlashAttention-3 keeps in float32 until it merges them
    activations         the rest of what a pass computes in between, in the pool of recorded passes or not
    rounding            what the allocator adds to each piece
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from longtake.engine.rollout import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Device memory by name.

    Args:
        bytes_by_name: what is named.
        peak_bytes: the most that was given out at once since `reset_peak`, the pool of recorded passes and
            the exchange's buffers included.
        peak_reserved_bytes: the most that the allocator took from the device.
    """

    bytes_by_name: dict[str, int]
    peak_bytes: int
    peak_reserved_bytes: int

    @property
    def unnamed_share(self) -> float:
        """Of the peak."""
        return 1 - sum(self.bytes_by_name.values()) / self.peak_bytes

    def to_json(self) -> dict[str, Any]:
        """For a benchmark's file."""
        return {**asdict(self), "unnamed_share": self.unnamed_share}


def read_ledger(rollout: Rollout, others: dict[str, int] | None = None) -> Ledger | None:
    """All device memory of a rollout by name; None without CUDA.

    To be called between two blocks while no other thread uses the device. Waits for it.

    Args:
        rollout: whose memory is named.
        others: bytes on the device besides it, by name.
    """
    device = rollout.device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    between = peak - torch.cuda.memory_allocated(device)
    pool = rollout.passes.pool_bytes  # the allocator holds it and counts it as free
    beside = rollout.model.exchange_bytes  # not of the allocator
    named = {name: size for name, size in rollout.memory().items() if not name.startswith("host")} | (others or {})
    named["recorded_passes"] -= pool
    own_tokens = rollout.timeline.max_own_blocks * rollout.shot.tokens_per_block
    named["attention_partials"] = rollout.path.partial_bytes(own_tokens)
    named["activations"] = max(0, between + pool - named["attention_partials"])
    named["rounding"] = rounding_bytes(device)
    named["workspaces"] = release_workspaces(device)
    return Ledger(
        bytes_by_name=named,
        peak_bytes=peak + pool + beside,
        peak_reserved_bytes=torch.cuda.max_memory_reserved(device),
    )


def reset_peak(device: torch.device) -> int:
    """The allocator's peak so far, which counts anew from here on; 0 without CUDA."""
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def rounding_bytes(device: torch.device) -> int:
    """What the allocator added to the pieces of memory that are in use, beyond what was asked for."""
    counted = torch.cuda.memory_stats(device)  # empty before the device is first used
    return int(counted.get("allocated_bytes.all.current", 0) - counted.get("requested_bytes.all.current", 0))


def release_workspaces(device: torch.device) -> int:
    """Let cuBLAS's workspaces go, and say how many bytes they were; the next product of matrices takes a new one.

    Nothing else may use the device meanwhile, and nothing may be being recorded. Passes that are recorded keep theirs:
    they are in the recordings' own pool.
    """
    before = torch.cuda.memory_allocated(device)
    torch._C._cuda_clearCublasWorkspaces()
    return before - torch.cuda.memory_allocated(device)
