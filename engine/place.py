"""What a launcher, or the user, says of this process in the environment; where models lie says store.py."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One of several processes that were started together.

    Args:
        rank, size: among all.
        local_rank, local_size: among those of this machine.
        address: where rank 0 is.
        mesh: axes that the user asked for, like ``tp=2,sp=2``; empty: none.
        graphs: whether passes are recorded as CUDA graphs.
        peer_memory: whether GPUs may write into each other's memory.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    mesh: str = ""
    graphs: bool = False
    peer_memory: bool = True

    @property
    def is_one_of_many(self) -> bool:
        """Whether there are others."""
        return self.size > 1


def place() -> Place:
    """What torchrun (or Ray Train, or any launcher with the same variables) says; a process alone without one.

    The mesh is ``LONGTAKE_MESH``'s. ``LONGTAKE_GRAPHS`` 1 or 0 records passes as CUDA graphs or does not; unless it
    says so, they are where several processes share a shot: one GPU alone is slower than its host is.
    ``LONGTAKE_PEER_MEMORY`` 0 keeps to collectives.
    """
    environment = os.environ
    rank, size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    return Place(
        rank=rank,
        size=size,
        local_rank=int(environment.get("LOCAL_RANK", rank)),
        local_size=int(environment.get("LOCAL_WORLD_SIZE", "0")),
        address=environment.get("MASTER_ADDR", "127.0.0.1"),
        mesh=environment.get("LONGTAKE_MESH", ""),
        graphs=environment.get("LONGTAKE_GRAPHS", str(int(size > 1))) != "0",
        peer_memory=environment.get("LONGTAKE_PEER_MEMORY", "1") != "0",
    )
