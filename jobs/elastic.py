"""Ray Train runs whose number of workers is the largest allowed one that a single host has room for.

Ray Train's own elastic policy adds up what all hosts have, and takes any number between the least and the most. A gang
stands on one host, and its heads can be dealt to some numbers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.train import Result, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy


class OneHostPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """The elastic policy of a gang.

    Args:
        scaling_config: from the least to the most workers.
        sizes: allowed numbers of workers, ascending.
    """

    def __init__(self, scaling_config: ScalingConfig, sizes: tuple[int, ...]) -> None:
        super().__init__(scaling_config)
        self._sizes = sizes

    def _count_possible_workers(self, reserved_resources: Mapping[str, Mapping[str, float]]) -> int:
        return allowed_workers(reserved_resources, self.scaling_config._resources_per_worker_not_none, self._sizes)


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
