"""A Ray of our own for one film on one workstation: on loopback only, gone with this process.

Ray decides these when it is imported or started, through environment variables; this is the only module that sets them.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

TOKEN_PATH = Path("~/.ray/auth_token")

_LOOPBACK = {
    # Ray binds every port to 127.0.0.1 where it believes that no other host can join: on Windows and macOS, unless this
    # is set; saying it on Linux has the same effect.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def bind_to_loopback() -> None:
    """Make every port of a Ray that this process starts listen on 127.0.0.1 only; to be called before Ray is imported.

    What the environment already says stays.
    """
    os.environ.update({key: value for key, value in _LOOPBACK.items() if key not in os.environ})


def show_token() -> None:
    """Show this user's Ray token, if there is one, to the cluster that is asked; to be called before Ray is imported.

    Ray itself does so only when RAY_AUTH_MODE says it.
    """
    has_one = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} or TOKEN_PATH.expanduser().exists()
    if has_one:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def talk_to(address: str) -> None:
    """Let the job interface talk to this cluster, whatever the environment says, which Ray prefers to its argument."""
    os.environ["RAY_API_SERVER_ADDRESS"] = address


@contextlib.contextmanager
def local_ray(*, num_cpus: int | None = None) -> Iterator[str]:
    """Start Ray with its dashboard on 127.0.0.1 and stop it again; yields the dashboard's address.

    Token authentication is Ray's default for a cluster that it starts itself, and stays on.

    Args:
        num_cpus: as many as there are if None.
    """
    bind_to_loopback()
    import ray

    with _deaf_to_ctrl_c():
        context = ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            configure_logging=False,
        )
    try:
        yield f"http://{context.dashboard_url}"
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes begun within ignore SIGINT, which a terminal sends to all of them.

    Ctrl-C is for the command, which then asks Ray to stop the film: Ray's dashboard, which takes that, must live on.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
