"""``longtake submit``: a film as a Ray job, under an id made from the film: submitting twice is submitting once.

A job runs once and dies with its cluster; what lasts is the run's directory. Submitting again after that goes on there.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from longtake.jobs.filmorder import ORDER_VARIABLE, FilmOrder
from longtake.kernels.errors import ConfigError, WorkerError

MAX_ORDER_BYTES = 120_000
START_S = 60.0
_POLL_S = 1.0
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A film's job; ``is_new`` is false when it was there already and goes on."""

    job: str
    is_new: bool


def submission_id(order: FilmOrder) -> str:
    """The job's id: ``longtake-harbour-1f0c...``, from the film's words and the directory."""
    slug = re.sub(r"[^a-z0-9]+", "-", order.record.title.lower()).strip("-")[:32] or "film"
    digest = hashlib.blake2b(f"{order.record.content_hash} {order.directory}".encode(), digest_size=8).hexdigest()
    return f"longtake-{slug}-{digest}"


def connect(address: str) -> Any:
    """A client of a cluster's job interface.

    Raises:
        ConfigError: nothing answers there.
    """
    from longtake.jobs.local_ray import show_token, talk_to

    show_token()
    talk_to(address)
    from ray.exceptions import AuthenticationError, RayError
    from ray.job_submission import JobSubmissionClient

    hint = "name the dashboard, like http://head:8265; its token is read from RAY_AUTH_TOKEN or ~/.ray/auth_token"
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ConfigError(f"--address {address}: the token is missing or another one; {hint}") from error
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ConfigError(f"--address {address}: {str(error).splitlines()[0]}; {hint}") from error


def submit(client: Any, order: FilmOrder, *, python: str = "python") -> Submitted:
    """Submit a film, unless its job is there and has not ended.

    Args:
        client: of `connect`.
        python: the interpreter on the cluster.

    Raises:
        ConfigError: the film is too long for a job.
        WorkerError: the cluster does not take it.
    """
    encoded = order.encode()
    if len(encoded) > MAX_ORDER_BYTES:
        raise ConfigError(f"the film is too long for one job ({len(encoded)} bytes packed); split it into several")
    base = submission_id(order)
    known = {name: status for name, status in _jobs(client).items() if name == base or name.startswith(f"{base}-")}
    running = [name for name, status in known.items() if status not in _ENDED]
    if running:
        return Submitted(job=running[0], is_new=False)
    # not the name of a job that has ended: Ray may not be done with that one, and the dashboard still shows it
    numbers = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
    job = next(name for name in numbers if name not in known)
    is_new = _submit_job(
        client,
        entrypoint=f"{shlex.quote(python)} -P -m longtake.jobs.driver",
        submission_id=job,
        runtime_env={"env_vars": {ORDER_VARIABLE: encoded}},
        metadata={"film": order.record.title, "directory": order.directory},
        entrypoint_num_cpus=0,
    )
    return Submitted(job=job, is_new=is_new)


def _submit_job(client: Any, **job: Any) -> bool:
    """Submit; a cluster that has just been started has no agent for jobs yet, and says so.

    Returns:
        Whether it was submitted here; someone else may have done so at the same moment.
    """
    until = time.monotonic() + START_S
    while True:
        try:
            client.submit_job(**job)
            return True
        except RuntimeError as error:
            if "already exists" in str(error):
                return False
            if "No available agent" not in str(error) or time.monotonic() > until:
                hint = "if another Ray runs on this machine, submit to it with --address, or stop it"
                raise WorkerError(f"the cluster takes no job: {error}; {hint}") from error
        time.sleep(_POLL_S)


def wait(client: Any, job: str, *, say: Callable[[str], None], stop: Callable[[], bool]) -> int:
    """Print a job's log until it ends; returns its exit code. When asked to stop, the film is paused first.

    Raises:
        WorkerError: the cluster is gone, or the job died without a code.
    """
    num_said, is_stopping = 0, False
    while True:
        with _answering():
            status, text = _status(client, job), client.get_job_logs(job)
        lines = text.splitlines()
        for line in lines[num_said:]:
            say(line)
        num_said = len(lines)
        if status is None or status in _ENDED:
            break
        if stop() and not is_stopping:
            is_stopping = True
            with _answering():
                client.stop_job(job)
        time.sleep(_POLL_S)
    with _answering():
        code = client.get_job_info(job).driver_exit_code
    if status == "STOPPED":
        return 3
    if code is None:
        raise WorkerError(f"job {job} ended as {status}; longtake logs DIR says more")
    return int(code)


def cluster_python(*, is_local: bool) -> str:
    """The interpreter that runs the job: this one here, whatever is first in the PATH on a cluster."""
    return sys.executable if is_local else "python"


def _status(client: Any, job: str) -> str | None:
    """The job's status; None if there is no such job."""
    return _jobs(client).get(job)


def _jobs(client: Any) -> dict[str, str]:
    """The status of all submitted jobs."""
    with _answering():
        return {info.submission_id: str(info.status.value) for info in client.list_jobs() if info.submission_id}


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Asking the cluster.

    Raises:
        WorkerError: it is gone.
    """
    try:
        yield
    except (ConnectionError, RuntimeError) as error:
        if isinstance(error, WorkerError):
            raise
        raise WorkerError(f"the cluster does not answer any more; submit the film again to go on: {error}") from error
