"""Gangs for tests: a function on every rank of a few processes over gloo.

The processes are forked from one that has imported PyTorch and the engine, so that a gang costs a fraction of a second;
not so on a machine with a GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)  # which the processes get: they import the test's module by its name
_PRELOAD = ["torch", "torch.distributed", "longtake.engine.gang", "longtake.engine.rollout", "longtake.engine.shot"]


class RankError(AssertionError):
    """What a rank raised, with its traceback."""


def run_ranks(
    function: Callable[..., Any], num_ranks: int, *arguments: Any, timeout_s: float = 240.0, **environment: str
) -> list[Any]:
    """Call ``function(rank, *arguments)`` on every rank.

    Args:
        function: of a test module; it may call ``longtake.engine.gang.join``.
        num_ranks: processes.
        arguments: must pickle.
        timeout_s: after which all are killed, so that a hang is told before pytest's own limit; no test waits for it.
        environment: variables beside those of a launcher.

    Returns:
        What it returned, by rank; for a rank that raised, the exception; for one that died, its exit code as RankError.
    """
    with socket.socket() as reserved:
        # bound until the end, so that nobody else is given the port; rank 0's store may still listen there
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        return _run_at(reserved.getsockname()[1], function, num_ranks, arguments, timeout_s, environment)


def _run_at(
    port: int,
    function: Callable[..., Any],
    num_ranks: int,
    arguments: tuple[Any, ...],
    timeout_s: float,
    environment: dict[str, str],
) -> list[Any]:
    context = multiprocessing.get_context("forkserver")
    # where there is a GPU, something that is imported looks for it, and CUDA cannot be used in a fork of what has
    context.set_forkserver_preload([] if torch.cuda.is_available() else _PRELOAD)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    ranks: list[tuple[ForkServerProcess, Connection]] = []
    for rank in range(num_ranks):
        ours, theirs = context.Pipe(duplex=False)
        variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_rank, args=(theirs, variables, function, rank, arguments), daemon=True)
        process.start()
        theirs.close()
        ranks.append((process, ours))
    deadline = time.monotonic() + timeout_s
    return [_result(process, ours, deadline) for process, ours in ranks]


def _result(process: ForkServerProcess, ours: Connection, deadline: float) -> Any:
    result: Any = None
    try:
        arrived = ours.poll(max(0.0, deadline - time.monotonic()))
        result = ours.recv() if arrived else RankError("hung")
    except EOFError:
        process.join(max(1.0, deadline - time.monotonic()))
        result = RankError(f"died with {process.exitcode}")
    process.join(max(1.0, deadline - time.monotonic()))
    if process.is_alive():
        process.kill()
    process.join()
    return result


def _rank(
    results: Connection,
    variables: dict[str, str],
    function: Callable[..., Any],
    rank: int,
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        result: Any = function(rank, *arguments)
    except BaseException as error:
        error.add_note("".join(traceback.format_exception(error)))
        result = error
    results.send(result)
    results.close()
