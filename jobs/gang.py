"""A gang on Ray: one Ray Train run whose workers, one a device, render what the director gives them.

    gang actor (detached, on the head) -- TorchTrainer.fit --> controller --> workers, STRICT_PACK on one host

After a worker's death Ray Train restarts all workers; the new rank 0 asks for work as a new incarnation and goes on
with the shot from its journal. The gang's actor ends with the run; the director starts another one if there is need.
"""

from __future__ import annotations

import logging
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from longtake.jobs.fleet import Crewing
from longtake.jobs.ledger import FilmRecord
from longtake.jobs.orders import Gang, Leave, Order, Verdict
from longtake.jobs.states import Failure, Lease, Progress
from longtake.kernels.errors import StorageError

if TYPE_CHECKING:
    from longtake.engine import gang as engine_gang

NAMESPACE = "longtake"
DIRECTOR = "director"
HEAD = {"node:__internal_head__": 0.0001}
POLL_S = 5.0
CALL_TIMEOUT_S = 10.0
_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's Train page
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # for room that Ray still believes in after a host is gone; then it looks again how many workers have room
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GangSpec:
    """What a gang is started with.

    Args:
        crewing: name and size.
        storage: a folder that all hosts see; Ray Train keeps its record of the run there.
        max_failures: restarts of its workers before the gang gives up; -1: no limit.
        lease_s: the director's.
        grow_s: between two looks at whether a gang that has shrunk can grow again.
    """

    crewing: Crewing
    storage: str
    max_failures: int
    lease_s: float
    grow_s: float = 60.0


class RayDirector:
    """The director as gangs and drivers reach it; finds it again after it was restarted. Used by one thread."""

    def __init__(self, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._actor: Any = None

    def call(self, method: str, *arguments: object, wait_s: float = 0.0) -> Any:
        """Call a method of the director.

        Raises:
            ConnectionError: it is not there, being restarted, or cannot write now: ask again.
            Exception: what the method raised.
        """
        try:
            if self._actor is None:
                self._actor = ray.get_actor(DIRECTOR, namespace=NAMESPACE)
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=self._timeout_s + wait_s)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, StorageError):
                raise ConnectionError(f"the director cannot use its ledger: {cause}") from error
            raise cause from error
        except (ray.exceptions.RayError, ValueError) as error:
            self._actor = None
            raise ConnectionError(f"the director does not answer: {error}") from error

    def next_order(self, gang: Gang) -> Order | Leave | None:
        """Waits up to `POLL_S` for a task."""
        answer: Order | Leave | None = self.call("next_order", gang, POLL_S, wait_s=POLL_S)
        return answer

    def heartbeat(self, lease: Lease, progress: Progress) -> Verdict:
        """Tell where a task is."""
        return Verdict(self.call("heartbeat", lease, progress))

    def stopped(self, lease: Lease) -> bool:
        """Tell that a task was stopped at a block boundary."""
        return bool(self.call("stopped", lease))

    def finish(self, lease: Lease, video: str | None) -> bool:
        """Tell that a task is finished."""
        return bool(self.call("finish", lease, video))

    def fail(self, lease: Lease, failure: Failure) -> bool:
        """Tell that a try failed."""
        return bool(self.call("fail", lease, failure))

    def film(self, directory: str) -> FilmRecord:
        """The film's record."""
        record: FilmRecord = self.call("film", directory)
        return record


def gang_loop(config: dict[str, Any]) -> None:
    """What Ray Train runs in every worker: render until the director has no more use for the gang."""
    from longtake.engine.gang import join as meet
    from longtake.jobs.render import follow

    spec: GangSpec = config["spec"]
    with meet() as ranks:
        if ranks.leads:
            _lead(spec, ranks)
            ranks.dismiss()
        else:
            follow(ranks, lambda: False)


def _lead(spec: GangSpec, ranks: engine_gang.Gang) -> None:
    """Rank 0: ask the director, and render with all ranks."""
    from longtake.engine.weights import read_spec
    from longtake.jobs.metrics import GangMetrics
    from longtake.jobs.render import engine
    from longtake.jobs.work import Worker

    render_shot, join = engine(ranks if ranks.size > 1 else None)
    device = spec.crewing.device
    Worker(
        client=RayDirector(),
        gang=Gang(name=spec.crewing.name, incarnation=uuid.uuid4().hex, device=device, num_devices=ranks.size),
        device=device,
        lease_s=spec.lease_s,
        film=RayDirector().film,
        read_model=read_spec,
        render_shot=render_shot,
        join=join,
        observe=GangMetrics(),
    ).run()


class GangActor:
    """Runs the gang's Ray Train run in a thread of its own, and ends with it."""

    def __init__(self, spec: GangSpec) -> None:
        self._me = ray.get_runtime_context().current_actor
        threading.Thread(target=self._run, args=(spec,), name="gang", daemon=True).start()

    def _run(self, spec: GangSpec) -> None:
        try:
            fit(spec)
        except Exception:
            log.exception("gang %s ended", spec.crewing.name)
        finally:
            ray.kill(self._me)


def fit(spec: GangSpec) -> None:
    """Run a gang until the director has no more use for it; blocks.

    Raises:
        ray.train.TrainingFailedError: its workers failed too often.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from longtake.engine.gang import group_backend
    from longtake.engine.mesh import TIMEOUT_S
    from longtake.jobs.elastic import GangTrainer

    sizes, on_gpu = spec.crewing.sizes, spec.crewing.device == "cuda"
    GangTrainer(
        gang_loop,
        sizes=sizes,
        train_loop_config={"spec": spec},
        torch_config=TorchConfig(backend=group_backend(on_gpu=on_gpu), timeout_s=int(TIMEOUT_S)),
        scaling_config=ScalingConfig(
            num_workers=sizes[0] if len(sizes) == 1 else (sizes[0], sizes[-1]),
            elastic_resize_monitor_interval_s=spec.grow_s,
            use_gpu=on_gpu,
            resources_per_worker={"GPU": 1} if on_gpu else {"CPU": 1},
            placement_strategy="STRICT_PACK",
        ),
        run_config=RunConfig(
            name=spec.crewing.name,
            storage_path=spec.storage,
            failure_config=FailureConfig(max_failures=spec.max_failures),
        ),
    ).fit()


def launch(spec: GangSpec) -> None:
    """Start a gang; returns at once."""
    Path(spec.storage).mkdir(parents=True, exist_ok=True)
    ray.remote(GangActor).options(
        name=spec.crewing.name,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        resources=HEAD,
        runtime_env={"env_vars": _TRAIN_ENVIRONMENT},
    ).remote(spec)
