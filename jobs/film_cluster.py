"""``[film.cluster]``: how a film is rendered on a cluster. It changes no frame, so no hash knows of it."""

from __future__ import annotations

from dataclasses import dataclass

from longtake.jobs.source import Source, Table, quote

MAX_GANG = 64
MAX_PRIORITY = 1_000_000
CLUSTER_KEYS = ("gpus_per_shot", "priority", "max_failures")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """What a film asks of a cluster.

    Args:
        gang_sizes: GPUs that may render one shot together, ascending; a gang that loses some goes on with fewer.
        priority: a higher one goes first.
        max_failures: failures without a new block between them after which a shot is dead.
    """

    gang_sizes: tuple[int, ...] = (1,)
    priority: int = 0
    max_failures: int = 10


def read_cluster(source: Source) -> ClusterSettings:
    """Read the table; without one all is default.

    Raises:
        ConfigError: with the line and the mend.
    """
    table = Table(source, ("film", "cluster"), CLUSTER_KEYS)
    default = ClusterSettings()
    priority = table.integer("priority", minimum=-MAX_PRIORITY, maximum=MAX_PRIORITY, example="5")
    max_failures = table.integer("max_failures", minimum=1, maximum=1000, example="10")
    return ClusterSettings(
        gang_sizes=_gang_sizes(table) or default.gang_sizes,
        priority=default.priority if priority is None else priority,
        max_failures=max_failures or default.max_failures,
    )


def _gang_sizes(table: Table) -> tuple[int, ...] | None:
    value = table.raw("gpus_per_shot")
    if value is None:
        return None
    sizes = value if isinstance(value, list) else [value]
    known = [size for size in sizes if type(size) is int and 1 <= size <= MAX_GANG]
    if not sizes or known != sizes or sorted(set(known)) != known:
        message = f"{quote(value)} is no number of GPUs; write gpus_per_shot = 1, or all allowed ones as [1, 2, 4]"
        raise table.error("gpus_per_shot", message)
    return tuple(known)
