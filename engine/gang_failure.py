"""How a rank's failure becomes every rank's: the error as others may raise it, and how it ends a process."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist

from longtake.kernels.errors import ConfigError, LongtakeError, WorkerError

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 3

# For a process that ends itself, before faulthandler does.
LAST_S = 5.0

_ABORTING = threading.Lock()


class GangError(WorkerError):
    """Another rank of the gang failed or died: start the gang again, it goes on from its last committed block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The news that a rank failed, or that it was lost: it died or fell silent, and can say nothing itself.

    Args:
        trace: where the error came from, if it is one that nobody expected.
    """

    rank: int
    error: BaseException
    lost: bool = False
    trace: str = ""

    def speaks(self, rank: int) -> bool:
        """Whether it is a rank's part to tell the user: rank 0's, or rank 1's when that is gone."""
        return rank == (1 if self.lost and self.rank == 0 else 0)

    def words(self, rank: int) -> str:
        """What a rank has to say: the trace of its own error, and the failure in a line if that is its part."""
        trace = self.trace if rank == self.rank else ""
        return trace + (f"longtake: {self.error}\n" if self.speaks(rank) else "")


def failed(error: BaseException, rank: int) -> Failed:
    """The news of this rank's own error."""
    unexpected = isinstance(error, Exception) and not isinstance(error, LongtakeError)
    trace = "".join(traceback.format_exception(error)) if unexpected else ""
    return Failed(rank=rank, error=portable(error, rank), trace=trace)


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


def abort_groups(patience_s: float) -> None:
    """Let go of collectives that will never complete; NCCL's are freed, gloo's are not.

    An abort may itself never end. So it has a thread of its own, one at a time and thereby one a process, that is not
    waited for beyond ``patience_s``.
    """

    def abort() -> None:
        with _ABORTING:
            if dist.is_initialized():
                with contextlib.suppress(RuntimeError, ValueError, AttributeError):
                    dist.distributed_c10d._abort_process_group()

    thread = threading.Thread(target=abort, name="gang-abort", daemon=True)
    thread.start()
    thread.join(patience_s)


def end_now(failure: Failed, rank: int, stacks: bool = False) -> NoReturn:
    """End this process whatever its threads do.

    Args:
        failure: why.
        rank: this one, which says first what it has to say.
        stacks: also print where the threads are.
    """
    try:
        print(failure.words(rank), end="", file=sys.stderr, flush=True)
        if stacks:
            faulthandler.dump_traceback()
    finally:
        os._exit(exit_code(failure.error))


def end_later(failure: Failed, rank: int, after_s: float) -> None:
    """As `end_now`, if this process is still there by then: what it puts away may hang as the collective did.

    A main thread that is done has told its error. The interpreter's own end may hang as well, when no thread of
    Python's runs any more: faulthandler ends that.
    """

    def end() -> None:
        time.sleep(after_s)
        if threading.main_thread().is_alive():
            end_now(failure, rank, stacks=True)

    with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # stderr is no file
        faulthandler.dump_traceback_later(after_s + LAST_S, exit=True)
    threading.Thread(target=end, name="gang-last", daemon=True).start()
