"""Hosts that a cluster should rent for films that wait, asked of Ray's autoscaler.

The request goes through the coordinator that Ray Train's runs use as well: whoever else called the autoscaler would
overwrite theirs, and they his. A cluster without an autoscaler hears it and does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray

from longtake.jobs.ledger import FilmRecord

RESOURCES = {"cuda": "GPU", "cpu": "CPU"}
MAX_HOSTS = 64
_REQUESTER = "longtake-director"
_EXPIRES_S = 180.0
_REPEAT_S = 60.0


class Rental:
    """What was asked for last; used by one thread at a time."""

    def __init__(self) -> None:
        self._asked: list[dict[str, float]] = []
        self._asked_s = float("-inf")

    def ask(self, lacking: Sequence[FilmRecord]) -> None:
        """Ask for room for gangs of films that no device is left for, as large as they may be.

        Raises:
            ray.exceptions.RayError: the cluster is going away.
        """
        bundles = [{RESOURCES[film.device]: float(film.gang_sizes[-1])} for film in lacking[:MAX_HOSTS]]
        now = time.monotonic()
        if bundles == self._asked and (not bundles or now - self._asked_s < _REPEAT_S):
            return
        from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as autoscaling  # seconds

        coordinator: Any = autoscaling.get_or_create_autoscaling_coordinator()
        if bundles:
            answer = coordinator.request_resources.remote(
                requester_id=_REQUESTER,
                resources=bundles,
                expire_after_s=_EXPIRES_S,
                priority=autoscaling.ResourceRequestPriority.LOW,
            )
        else:
            answer = coordinator.cancel_request.remote(_REQUESTER)
        ray.get(answer, timeout=10)
        self._asked, self._asked_s = bundles, now
