"""How much of each tier a cache may take."""

from __future__ import annotations

from dataclasses import dataclass

from longtake.kernels.errors import CapacityError, ConfigError
from longtake.offload.shape import ModelKVShape

STAGING_FRAMES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheBudget:
    """Bytes a tier, and what is known of the rollout that makes more of them useless.

    Args:
        device_bytes: most bytes of the device arena; None: as many as `num_blocks` needs.
        num_blocks: most history blocks that a plan reads at once; one more frame is added for the block being
            committed. None: `device_bytes` decides alone. With both, the smaller arena is made.
        host_bytes: most bytes of the host pool; None: none without a disk, a few frames of staging with one.
        disk_bytes: most bytes of payloads on the disk; None: as many as there are.
        total_blocks: blocks of the whole rollout; a host pool for more is not made.
    """

    device_bytes: int | None = None
    num_blocks: int | None = None
    host_bytes: int | None = None
    disk_bytes: int | None = None
    total_blocks: int | None = None

    def num_frames(self, shape: ModelKVShape) -> int:
        """Blocks that the device arena holds, the one being committed included.

        Raises:
            ConfigError: neither bound is given.
            CapacityError: the budget is smaller than one block.
        """
        if self.device_bytes is None and self.num_blocks is None:
            raise ConfigError("a cache budget needs device_bytes, num_blocks or both")
        wanted = None if self.num_blocks is None else self.num_blocks + 1
        if self.device_bytes is None:
            assert wanted is not None
            return wanted
        fitting = self.device_bytes // shape.block_bytes
        if fitting < 1:
            raise CapacityError(
                f"a device budget of {self.device_bytes:,} bytes holds no block of {shape.block_bytes:,} bytes; "
                f"give the cache at least that much on the device"
            )
        return fitting if wanted is None else min(fitting, wanted)

    def num_host_frames(self, shape: ModelKVShape, *, disk: bool) -> int:
        """Blocks that the host pool holds.

        Raises:
            CapacityError: the budget is smaller than the least that works.
        """
        if self.host_bytes is None:
            return STAGING_FRAMES if disk else 0
        fitting = self.host_bytes // shape.block_bytes
        least = 2 if disk else 1
        if fitting < least:
            raise CapacityError(
                f"a host budget of {self.host_bytes:,} bytes holds {fitting} blocks of {shape.block_bytes:,} bytes; "
                f"give the cache at least {least * shape.block_bytes:,} bytes of host memory"
            )
        if self.total_blocks is not None:
            return min(fitting, self.total_blocks + STAGING_FRAMES)
        return fitting
