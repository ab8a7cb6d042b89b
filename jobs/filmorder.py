"""What `submit` hands to the cluster: a film and how to keep its gangs, as text in one environment variable. No Ray."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import zlib
from dataclasses import dataclass

from longtake.jobs.director import LEASE_S
from longtake.jobs.ledger import FilmRecord

ORDER_VARIABLE = "LONGTAKE_FILM_ORDER"


@dataclass(frozen=True, slots=True, kw_only=True)
class FarmOptions:
    """How the director keeps its gangs.

    Args:
        lease_s: silence after which a gang has lost its shot.
        gang_idle_s: a gang without work for so long lets its devices go.
        gang_stuck_s: a gang that says nothing any more for so long is killed; workers started anew take a while.
        gang_start_s: the same for one that never said anything; it may wait for hosts that are being rented.
        watch_s: between two looks at gangs and wishes.
        max_gangs: no more than so many; None: as many as there are devices.
        relaunch_s: pause before a gang is started in place of one that died young; doubles each time.
        rents: whether to ask the cluster's autoscaler for hosts that films lack.
        grow_s: between two looks at whether a gang that has shrunk can grow again.
    """

    lease_s: float = LEASE_S
    gang_idle_s: float = 60.0
    gang_stuck_s: float = 300.0
    gang_start_s: float = 1800.0
    watch_s: float = 1.0
    max_gangs: int | None = None
    relaunch_s: float = 2.0
    grow_s: float = 60.0
    rents: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FilmOrder:
    """What is submitted: the film's record, where it goes, and how gangs are kept if there is no director yet."""

    directory: str
    record: FilmRecord
    options: FarmOptions = dataclasses.field(default_factory=FarmOptions)

    def encode(self) -> str:
        """As text for an environment variable."""
        return base64.b64encode(zlib.compress(json.dumps(dataclasses.asdict(self)).encode(), 9)).decode()

    @classmethod
    def decode(cls, text: str) -> FilmOrder:
        """What `encode` gave."""
        data = json.loads(zlib.decompress(base64.b64decode(text)))
        record = FilmRecord(**{**data["record"], "gang_sizes": tuple(data["record"]["gang_sizes"])})
        return cls(directory=data["directory"], record=record, options=FarmOptions(**data["options"]))


def order_of_job() -> FilmOrder:
    """The order of the job that this process is."""
    return FilmOrder.decode(os.environ[ORDER_VARIABLE])
