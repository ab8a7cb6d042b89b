"""Whether a film's cache budgets hold the least that its shots need, told before anything is rendered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from longtake.engine.config import HistoryPolicy, ShotConfig
from longtake.engine.timeline import Timeline
from longtake.jobs.film import Film
from longtake.kernels.errors import CapacityError


def check_budgets(film: Film, configs: Mapping[str, ShotConfig], num_ranks: int = 1) -> None:
    """See that every budget of a film's shots holds what the engine would otherwise refuse to begin with.

    Args:
        num_ranks: devices that render a shot together; each keeps its heads of every block.

    Raises:
        ConfigError: one is too small; with its line in the film.
    """
    from longtake.engine.shotcache import cache_budgets, check_room, kv_shape  # imports torch

    for shot in film.shots:
        config, cache = configs[shot.name], shot.settings.cache
        if cache.device_bytes is cache.host_bytes is cache.disk_bytes is None:
            continue
        timeline = Timeline(config, config.after_blocks)
        heads = range(max(1, config.model.transformer.num_heads // num_ranks))
        budgets = cache_budgets(config, timeline, heads)
        shapes = [kv_shape(config, heads, form) for form in range(len(budgets))]
        checks: list[tuple[str, Callable[[], object]]] = []
        for budget, shape in zip(budgets, shapes, strict=True):
            checks.append(("device", partial(budget.num_frames, shape)))
            checks.append(("host", partial(budget.num_host_frames, shape, disk=True)))
        if config.history.policy is HistoryPolicy.RETRIEVE:
            checks.append(("disk", partial(check_room, config, timeline, shapes[0], budgets[0], disk=True)))
        for key, check in checks:
            try:
                check()
            except CapacityError as error:
                raise film.source.error(film.key(shot, "cache", key), str(error)) from error
