"""A whole cluster and the job of one film as one tree of processes, to be killed as one: for test_kills.

    python -P -m tests.ray.cluster_process FILM DIR NUM_NODES

A head without CPUs and nodes with one CPU each, all on loopback. A line "node" on stdin adds a node. Prints what the
job prints; the exit code is the job's.
"""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path
from typing import Any

from longtake.jobs.film import load_film
from longtake.jobs.filmorder import FarmOptions, FilmOrder
from longtake.jobs.ledger import FilmRecord
from longtake.jobs.local_ray import bind_to_loopback


def order(film_path: str, directory: str) -> FilmOrder:
    film = load_film(film_path)
    record = FilmRecord(
        title=film.title,
        content_hash=film.content_hash,
        toml=Path(film_path).read_text(),
        source=film_path,
        max_tries=50,
        backoff_s=0.2,
    )
    options = FarmOptions(lease_s=8.0, watch_s=0.5, relaunch_s=0.5, max_gangs=2)
    return FilmOrder(directory=directory, record=record, options=options)


def main() -> int:
    film, directory, num_nodes = sys.argv[1:4]
    bind_to_loopback()
    import ray
    from ray.cluster_utils import Cluster

    from longtake.jobs.driver import follow
    from longtake.jobs.gang import NAMESPACE

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(int(num_nodes)):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)

    def listen() -> None:
        for _ in sys.stdin:
            cluster.add_node(num_cpus=1)

    threading.Thread(target=listen, daemon=True).start()
    code = follow(order(film, directory), stop=lambda: False, say=lambda line: print(line, flush=True), interval_s=0.3)
    stop_ray: Any = ray.shutdown  # has no types
    stop_ray()
    cluster.shutdown()
    return code


if __name__ == "__main__":
    sys.exit(main())
