"""ray_cluster.yaml on one machine: its workers are raylets, which Ray's own autoscaler starts and ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from longtake.jobs.local_ray import bind_to_loopback, show_token
from longtake.jobs.submit import connect
from longtake.kernels.errors import ConfigError
from tests.ray.films import kill_tree, wait_for

YAML = Path(__file__).parents[2] / "ray_cluster.yaml"
HEAD_TYPE = "ray.head.default"  # as the provider of such hosts calls it
HEAD_ID = "f" * 51 + "0" * 5
STORE_BYTES = 80_000_000  # of each host's object store
ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    # as `ray up` sets them for a head
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_NODE_TYPE_NAME": HEAD_TYPE,
}


@contextlib.contextmanager
def scaled_cluster(**scale: Any) -> Iterator[str]:
    """A head that has no worker yet, see `cluster_config`; yields the dashboard's address."""
    bind_to_loopback()
    subprocess.run(["ray", "get-auth-token", "--generate"], check=True, stdout=subprocess.DEVNULL)
    show_token()
    gcs, dashboard, agent = _free_ports(3)
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # a short path, for sockets
        config = Path(folder) / "cluster.json"
        config.write_text(json.dumps(cluster_config(gcs, **scale)))
        command = ["ray", "start", "--head", "--block", "--num-cpus=0", f"--object-store-memory={STORE_BYTES}"]
        command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        command += ["--dashboard-host=127.0.0.1", f"--autoscaling-config={config}", f"--temp-dir={folder}"]
        with open(Path(folder) / "head.txt", "w") as output:
            environment = {**os.environ, **ENVIRONMENT}
            head = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{dashboard}"
            wait_for(lambda: _answers(head, address), timeout_s=60)
            yield address
        finally:
            kill_tree(head)


def _answers(head: subprocess.Popen[bytes], address: str) -> bool:
    assert head.poll() is None, "the head ended"
    try:
        return connect(address) is not None
    except ConfigError:
        return False


def cluster_config(gcs: int, *, cpus: int, max_workers: int, idle_timeout_minutes: float) -> dict[str, Any]:
    """ray_cluster.yaml with workers of so many CPUs each on this machine, where nothing is installed or mounted.

    Args:
        gcs: the head's port.
    """
    config: dict[str, Any] = yaml.safe_load(YAML.read_text())
    types = config["available_node_types"]
    types[HEAD_TYPE] = {**types.pop("head"), "node_config": {}}
    resources = {"CPU": cpus, "object_store_memory": STORE_BYTES}
    types["gpu"].update(resources=resources, node_config={}, max_workers=max_workers)
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": f"127.0.0.1:{gcs}",
        "head_node_id": HEAD_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    config.update(provider=provider, head_node_type=HEAD_TYPE, max_workers=max_workers)
    config.update(idle_timeout_minutes=idle_timeout_minutes, auth={}, file_mounts={}, cluster_synced_files=[])
    return {**config, **{key: [] for key in config if key.endswith("_commands")}}


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
