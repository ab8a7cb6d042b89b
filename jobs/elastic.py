"""Ray Train runs whose number of workers is the largest allowed one that a single host has room for.

Ray Train's own elastic policy adds up what all hosts have, and takes any number between the least and the most. A gang
stands on one host, and its heads can be dealt to some numbers only. And where workers die again and again soon after
their start, a device is lost that Ray still counts: the gang goes on as a smaller one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray.train import Result, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ResizeDecision, ScalingDecision

YOUNG_S = 120.0
MOST_YOUNG_DEATHS = 3


class OneHostPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """The elastic policy of a gang.

    Args:
        scaling_config: from the least to the most workers.
        sizes: allowed numbers of workers, ascending.
    """

    def __init__(self, scaling_config: ScalingConfig, sizes: tuple[int, ...]) -> None:
        super().__init__(scaling_config)
        self._deaths = Deaths(sizes)

    def _get_resize_decision(self, num_workers: int) -> ResizeDecision:
        self._deaths.started(num_workers, time.monotonic())
        return super()._get_resize_decision(num_workers)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._deaths.ended(time.monotonic())
        return super().make_decision_for_non_running_worker_group()

    def _count_possible_workers(self, reserved_resources: Mapping[str, Mapping[str, float]]) -> int:
        needed = self.scaling_config._resources_per_worker_not_none
        return allowed_workers(reserved_resources, needed, self._deaths.sizes)


class Deaths:
    """Which sizes a gang has left after deaths soon after a start.

    Args:
        sizes: allowed at first, ascending.
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self._started: tuple[int, float] | None = None
        self._num_young = 0

    def started(self, size: int, now_s: float) -> None:
        """Workers are being started."""
        self._started = (size, now_s)

    def ended(self, now_s: float) -> None:
        """There are no workers; called any number of times until they are started again."""
        if self._started is None:
            return
        (size, began_s), self._started = self._started, None
        self._num_young = self._num_young + 1 if now_s - began_s < YOUNG_S else 0
        smaller = tuple(one for one in self.sizes if one < size)
        if self._num_young >= MOST_YOUNG_DEATHS and smaller:
            self.sizes, self._num_young = smaller, 0


def allowed_workers(
    hosts: Mapping[str, Mapping[str, float]], per_worker: Mapping[str, float], sizes: tuple[int, ...]
) -> int:
    """The largest allowed number of workers that one host has resources for; 0 if there is none."""
    needed = {name: amount for name, amount in per_worker.items() if amount > 0}
    rooms = (min(int(host.get(name, 0.0) // amount) for name, amount in needed.items()) for host in hosts.values())
    room = max(rooms, default=0)
    return max((size for size in sizes if size <= room), default=0)


class GangTrainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer with allowed sizes; with one size it is TorchTrainer itself.

    Args:
        sizes: allowed numbers of workers, ascending.
        how: as for TorchTrainer; its scaling config's number of workers is set here.
    """

    def __init__(self, *arguments: Any, sizes: tuple[int, ...], **how: Any) -> None:
        super().__init__(*arguments, **how)
        self._sizes = sizes

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        if len(self._sizes) > 1:
            parts["scaling_policy"] = OneHostPolicy(self.scaling_config, self._sizes)
        return super()._initialize_and_run_controller(**parts)
