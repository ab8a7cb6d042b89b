"""What a cache tells of itself: counters since its start, and how full its tiers are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """What a cache did so far.

    Args:
        stalled_host_s: seconds that commits waited for a host frame, that is, for the disk.
        stalled_disk_s: seconds that `prepare` waited for reads from the disk.
        up_bytes, down_bytes: copied host -> device, device -> host.
        num_written, num_read: blocks made durable; blocks read from the disk whole.
        written_bytes, read_bytes: payloads written to the disk, and read from it whole or page by page.
        num_hits, num_misses: blocks that `prepare` found on the device or the host; that it, or what it handed out,
            had to wait for the disk for.
        last_lag_s, max_lag_s: from the end of a commit until the block was durable.
    """

    stalled_host_s: float = 0.0
    stalled_disk_s: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    num_written: int = 0
    num_read: int = 0
    written_bytes: int = 0
    read_bytes: int = 0
    num_hits: int = 0
    num_misses: int = 0
    last_lag_s: float = 0.0
    max_lag_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class HostCounters:
    """What a host tier did so far; `CacheStats` tells it, writes stalled for as host, reads as disk."""

    stalled_write_s: float = 0.0
    stalled_read_s: float = 0.0
    num_written: int = 0
    num_read: int = 0
    read_bytes: int = 0
    last_lag_s: float = 0.0
    max_lag_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TierUse:
    """How full one tier of this rank's cache is.

    Args:
        used_bytes: of blocks that it holds.
        budget_bytes: the most it may hold; None: as much as there is room for.
    """

    used_bytes: int
    budget_bytes: int | None
