"""How a rank's failure becomes every rank's: the error as others may raise it, what it means to the process."""

from __future__ import annotations

import contextlib
import os
import pickle
import traceback
from dataclasses import dataclass

import torch.distributed as dist

from longtake.kernels.errors import ConfigError, LongtakeError, WorkerError

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 3


class GangError(WorkerError):
    """Another rank of the gang failed or died: start the gang again, it goes on from its last committed block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The news that a rank failed, or that it was lost: it died or fell silent, and can say nothing itself."""

    rank: int
    error: BaseException
    lost: bool = False


def exit_code(error: BaseException) -> int:
    """The exit code that an error ends a process with."""
    if isinstance(error, ConfigError):
        return EXIT_BAD_INPUT
    return EXIT_FAILED if isinstance(error, Exception) else EXIT_INTERRUPTED


def portable(error: BaseException, rank: int) -> BaseException:
    """An error as another rank may raise it: its own type where that is ours, told in words where it is not."""
    if not isinstance(error, Exception):
        return KeyboardInterrupt(f"rank {rank} was stopped")
    if isinstance(error, LongtakeError):
        if error.rank is None:
            error.rank = rank
        with contextlib.suppress(pickle.PickleError, TypeError, AttributeError):
            pickle.loads(pickle.dumps(error))
            return error
    where = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(where[-1].filename)}:{where[-1].lineno}" if where else ""
    return GangError(f"rank {rank} failed{place}: {type(error).__name__}: {error}", rank=rank)


def abort_groups() -> None:
    """Let go of collectives that will never complete; NCCL's are freed, gloo's are not."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError, ValueError, AttributeError):
            dist.distributed_c10d._abort_process_group()
