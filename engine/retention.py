"""What of a shot's history stays on the disk when it is to keep only what a block to come may read.

A shot goes on, after whatever ended it, from the last entry that every rank has journaled and whose latents are kept.
What no entry from there on reads is dropped; the blocks behind that point wait until it has moved on. Shots that start
from this one do so from its latents, which are all kept.
"""

from __future__ import annotations

from collections.abc import Callable

from longtake.engine.config import Keep
from longtake.engine.gang import Gang
from longtake.engine.timeline import Timeline
from longtake.offload.cache import KVCache
from longtake.offload.forms import FormCache


class Retention:
    """Drops history from the disk. All ranks of a gang call it at the same places.

    Args:
        keep: what stays.
        timeline: of the shot.
        cache: of this rank.
        gang: of this rank.
        num_latents: how many blocks' latents are on the disk; None: another rank keeps them.
    """

    def __init__(
        self,
        keep: Keep,
        timeline: Timeline,
        cache: KVCache | FormCache,
        gang: Gang,
        num_latents: Callable[[], int] | None,
    ) -> None:
        self._keep, self._timeline, self._cache, self._gang = keep, timeline, cache, gang
        self._num_latents = num_latents
        self._dropped_to = 0
        self._left: set[int] = set()

    def __call__(self, settle: Callable[[], None]) -> None:
        """Drop what can be dropped.

        Args:
            settle: makes all that was committed durable, with its latents; called when the disk's budget has no room
                for another block without it.

        Raises:
            StorageError, DiskFullError: the journal cannot be written, or a file not deleted.
        """
        if self._keep is Keep.ALL:
            return
        self._drop()
        if self._cache.disk_room_blocks < 1:  # the same on every rank
            settle()
            self._drop()

    def _drop(self) -> None:
        durable = self._cache.durable_blocks
        if self._num_latents is not None:
            durable = min(durable, self._timeline.num_known(self._num_latents()))
        safe = self._gang.minimum(durable)
        needed = frozenset(self._timeline.needed_later(safe))
        candidates = self._left.union(self._timeline.kept_pages(self._dropped_to, safe))
        self._cache.drop(candidates - needed)
        self._left, self._dropped_to = candidates & needed, max(safe, self._dropped_to)
