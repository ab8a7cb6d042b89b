"""A whole cluster and the job of one film as one tree of processes, to be killed as one: for test_kills.

    python -P -m tests.ray.cluster_process FILM DIR COUNTS [SIZES [DEVICE]]

A head without devices, and nodes with so many each, such as 1,1; all on loopback. "node" on stdin adds one of one.
SIZES are those of gangs, such as 1,2; DEVICE is cpu or cuda. Prints what the job prints, and ends with its exit code.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from longtake.jobs.film import load_film
from longtake.jobs.filmorder import FarmOptions, FilmOrder
from longtake.jobs.ledger import FilmRecord
from longtake.jobs.local_ray import bind_to_loopback


def order(film_path: str, directory: str, sizes: tuple[int, ...], device: str) -> FilmOrder:
    film = load_film(film_path)
    record = FilmRecord(
        title=film.title,
        content_hash=film.content_hash,
        toml=Path(film_path).read_text(),
        source=film_path,
        max_tries=50,
        backoff_s=0.2,
        gang_sizes=sizes,
        device=device,
    )
    options = FarmOptions(lease_s=8.0, watch_s=0.5, relaunch_s=0.5, max_gangs=2)
    return FilmOrder(directory=directory, record=record, options=options)


def main() -> int:
    film, directory, counts = sys.argv[1:4]
    sizes = tuple(map(int, sys.argv[4].split(","))) if len(sys.argv) > 4 else (1,)
    device = sys.argv[5] if len(sys.argv) > 5 else "cpu"
    bind_to_loopback()
    import ray
    from ray.cluster_utils import Cluster

    from longtake.jobs.driver import follow
    from longtake.jobs.gang import NAMESPACE

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = {
        "num_cpus": 0,
        "num_gpus": 0,
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": port,
    }
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)

    def add_node(count: int) -> None:
        cluster.add_node(**({"num_cpus": count} if device == "cpu" else {"num_cpus": 1, "num_gpus": count}))

    for count in counts.split(","):
        add_node(int(count))
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)

    what, codes = order(film, directory, sizes, device), list[int]()
    lines: queue.Queue[str] = queue.Queue()

    def render() -> None:
        codes.append(follow(what, stop=lambda: False, say=lambda line: print(line, flush=True), interval_s=0.3))

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)

    job = threading.Thread(target=render, daemon=True)
    job.start()
    threading.Thread(target=listen, daemon=True).start()
    while job.is_alive():
        with contextlib.suppress(queue.Empty):
            lines.get(timeout=0.3)
            add_node(1)  # Ray starts nodes in the main thread only
    code = codes[0] if codes else 1
    stop_ray: Any = ray.shutdown  # has no types
    stop_ray()
    cluster.shutdown()
    return code


if __name__ == "__main__":
    sys.exit(main())
