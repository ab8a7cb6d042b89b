"""ray_cluster.yaml scales: hosts come when shots wait, as many as it allows, and go when there is nothing to do."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("yaml")  # comes with Ray, which is not to be imported yet

from longtake.engine.video import probe
from longtake.jobs.submit import connect, submit
from tests.ray.autoscaling import scaled_cluster
from tests.ray.films import wait_for
from tests.ray.following import film_order

pytestmark = pytest.mark.ray


def workers(address: str) -> int:
    """Hosts of a cluster without its head."""
    from ray.util.state import list_nodes

    return sum(node.state == "ALIVE" and not node.is_head_node for node in list_nodes(address))


def test_hosts_come_when_shots_wait_and_go_again(film_of: Callable[..., Path], tmp_path: Path) -> None:
    shots = tuple((name, 20, None) for name in "abc")
    order = film_order(film_of("scaled", shots=shots, title="Scaled"), tmp_path / "out", sizes=(1, 2, 4))
    options = dataclasses.replace(order.options, rents=True, gang_idle_s=2.0)
    with scaled_cluster(cpus=2, max_workers=2, idle_timeout_minutes=0.5) as address:
        client = connect(address)
        job = submit(client, dataclasses.replace(order, options=options), python=sys.executable).job
        seen = [workers(address)]
        while client.get_job_status(job) not in ("SUCCEEDED", "FAILED"):
            seen.append(workers(address))
        assert client.get_job_status(job) == "SUCCEEDED", client.get_job_logs(job)
        assert seen[0] == 0
        assert max(seen) == 2, "three shots wait, and no more than two hosts may come"
        wait_for(lambda: workers(address) == 0)
    assert probe(tmp_path / "out" / "film.mp4").frames == 3 * 160
    for name in "abc":
        log = (tmp_path / "out" / f"{name}.log").read_text()
        assert set(re.findall(r"on (\d) x cpu", log)) == {"2"}, "a gang of what a host has"
