"""The processes that render one shot together: how they meet, agree, and end together.

Collectives of the model run on torch's process groups (NCCL, or gloo on CPUs). Everything else (agreements, tasks,
errors) goes over connections of its own (gang_link), so that no rank ever waits for one that is gone: an error on one
rank, or its death, is known to all at once, and each of them raises it. A rank that is stuck in a collective which will
never complete has its groups aborted, and is ended hard when that does not free it.

    with join() as gang:                a gang of one when there is nothing to join
        gang.lead(read_prompts)         rank 0 does it, all have the result
        gang.minimum(num_blocks)        every rank's say
        gang.any(stop_requested)

An agreement is made by every rank, in the same order.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from longtake.engine.gang_failure import Failed, GangError, abort_groups, end_later, end_now, failed
from longtake.engine.gang_link import HEARTBEAT_S, LOST_AFTER_S, Door, Link, knock
from longtake.engine.gang_messages import Agreed, Dismissed, Post, Said, Task
from longtake.engine.mesh import ALONE, TIMEOUT_S, Axis, Mesh, MeshShape, default_mesh, open_mesh, parse_mesh
from longtake.engine.place import Place, place
from longtake.kernels.errors import ConfigError, LongtakeError

T = TypeVar("T")

# Between the news that a rank failed and the hard end of one that is stuck.
GRACE_S = 5.0
# For a rank that noticed, to put its things away.
UNWIND_S = 60.0
# For a rank that works, to notice before its collectives are aborted.
_NOTICE_S = 0.5
# An error that may be the echo of another rank's end waits this long for the news.
_NEWS_S = 10.0


class Gang:
    """One rank's side of the gang. Agreements come from one thread.

    As a context manager it ends with its body: on rank 0 that dismisses the others, which wait for it.

    Args:
        rank, size: of this process.
        local_rank: among those of this machine: its device.
        timeout_s: after which a rank that lives but does not answer is an error.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, timeout_s: float = TIMEOUT_S) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._timeout_s = timeout_s
        self._thread = threading.get_ident()  # whose wait for a collective would be a hang
        self._link: Link | None = None
        self._number = 0
        self._news = threading.Condition()
        self._said: dict[int, dict[int, Any]] = {}
        self._agreed: dict[int, Any] = {}
        self._tasks: list[Task | Dismissed] = []
        self._posts: list[Any] = []
        self._dismissed = self._closed = self._noticed = False
        self._failure: Failed | None = None
        self._mesh: Mesh | None = None
        self.dismissed_with = 0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0: it reads the film, writes video and status, and tells the others what to do."""
        return self.rank == 0

    # -- agreements

    def lead(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0, on every rank; it must pickle. Only rank 0 calls it."""
        if self._link is None:
            return make()
        self._number += 1
        if self.leads:
            value = make()
            self._link.send_all(Agreed(number=self._number, value=value))
            return value
        agreed: T = self._answer()
        return agreed

    def agree(self, value: T, combine: Callable[[list[T]], T]) -> T:
        """Combine every rank's value, in rank order, on rank 0; the result on every rank.

        Raises:
            GangError: a rank failed, died, or does not answer; LongtakeError: that rank's own.
        """
        if self._link is None:
            return combine([value])
        self._number += 1
        if not self.leads:
            self._link.send(0, Said(number=self._number, value=value))
            agreed: T = self._answer()
            return agreed
        number, others = self._number, range(1, self.size)

        def missing() -> list[int]:
            return [rank for rank in others if rank not in self._said.get(number, {})]

        if not self._wait(lambda: not missing(), self._timeout_s):
            silent = missing()[0]
            raise GangError(f"rank {silent} lives but has not answered for {self._timeout_s:.0f} s", rank=silent)
        with self._news:
            said = self._said.pop(number)
        result = combine([value, *(said[rank] for rank in others)])
        self._link.send_all(Agreed(number=number, value=result))
        return result

    def minimum(self, number: int) -> int:
        """The least of every rank's numbers."""
        return self.agree(number, min)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return self.agree(flag, any)

    def check(self) -> None:
        """Raise what ended the gang: another rank's failure, or one in another thread of this rank."""
        with self._news:
            if self._failure is not None:
                self._noticed |= threading.get_ident() == self._thread
                raise self._failure.error

    # -- tasks

    def tell(self, task: Any) -> None:
        """Rank 0 gives all others a task; it must pickle."""
        if self._link is not None:
            self.check()
            self._link.send_all(Task(value=task))

    def receive(self) -> Any:
        """The next task on another rank; waits as long as it takes.

        Returns:
            The task; None when the gang is dismissed.
        """
        self._wait(lambda: bool(self._tasks), None)
        with self._news:
            task = self._tasks.pop(0)
        return task.value if isinstance(task, Task) else None

    def post(self, value: Any) -> None:
        """Rank 0 sends all others something beside the tasks, in order; from any thread. It must pickle."""
        if self._link is not None:
            self.check()
            self._link.send_all(Post(value=value))

    def receive_post(self) -> Any:
        """The next post on another rank, in a thread of its own; None when the gang ended."""
        with self._news:
            self._news.wait_for(lambda: self._posts or self._failure is not None or self._dismissed or self._closed)
            return self._posts.pop(0) if self._posts and self._failure is None else None

    def host_axis(self) -> Axis:
        """All ranks, in order, on a process group of their own for tensors in host memory; every rank calls it, at the
        same point; not a gang of one, which has no groups. Unlike NCCL's, it may be used by one thread beside another's
        collectives."""
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=self._timeout_s))
        return Axis(index=self.rank, size=self.size, group=group.group_name)

    def dismiss(self, code: int = 0) -> None:
        """Rank 0 has no more tasks; the other ranks' processes end with that exit code."""
        if self._link is not None and self.leads:
            self._dismissed = True
            self._link.send_all(Dismissed(code=code))

    # -- what the ranks share

    def mesh(self, num_heads: int) -> Mesh:
        """The gang's mesh for a model; every rank calls it. Its axes are ``LONGTAKE_MESH``'s, or all of them sp.

        Raises:
            ConfigError: the gang's size does not fit the model's heads, or that variable.
        """
        shape = self.mesh_shape(num_heads)
        if self.size == 1:
            return ALONE
        if self._mesh is None or self._mesh.shape != shape:
            self._mesh = open_mesh(shape, self._timeout_s)
        return self._mesh

    def mesh_shape(self, num_heads: int) -> MeshShape:
        """As ``mesh``, without making anything."""
        text = place().mesh if self.size > 1 else ""
        shape = parse_mesh(text) if text else default_mesh(self.size)
        if shape.size != self.size:
            raise ConfigError(f"LONGTAKE_MESH={text} is a mesh of {shape.size} processes, not of {self.size}")
        shape.check(num_heads)
        return shape

    def device(self, name: str) -> str:
        """This rank's device of a kind: cuda on each rank is the GPU of its place on the machine.

        Raises:
            ConfigError: a single GPU was named for several ranks.
        """
        if self.size == 1 or name == "cpu":
            return name
        if ":" in name:
            raise ConfigError(
                f"device {name!r} is one GPU, and {self.size} processes were started: name the kind, cuda"
            )
        return f"{name}:{self.local_rank}"

    # -- the end

    def __enter__(self) -> Gang:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        late = self._await_dismissal() if error is None else None
        if (ended := error or late) is None:
            self._close()
            return
        failure = self._failure_behind(ended)
        self._close(self._failure)
        if failure is not None and failure.error is not ended:
            raise failure.error from ended
        if late is not None:
            raise late

    def _await_dismissal(self) -> BaseException | None:
        """A rank that left before rank 0 would pass for dead. Returns what ended the gang meanwhile."""
        if self._link is not None and not self.leads and not self._closed:
            try:
                self._wait(lambda: self._dismissed, None)
            except BaseException as late:
                return late
        return None

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """An error in the body is told to the other ranks before anything is unwound; theirs is raised in its place."""
        try:
            yield
        except BaseException as error:
            failure = self._failure_behind(error)
            if failure is not None and failure.error is not error:
                raise failure.error from error
            raise

    def _failure_behind(self, error: BaseException) -> Failed | None:
        """The other rank's failure that ``error`` follows from; if there is none, the others are told of this one."""
        if self._link is None:
            return None
        # what torch raises of a broken collective says nothing of why; the news may still be on its way
        echo = isinstance(error, RuntimeError) and not isinstance(error, LongtakeError | torch.OutOfMemoryError)
        with self._news:
            if echo:
                self._news.wait_for(lambda: self._failure is not None, _NEWS_S)
            self._noticed |= threading.get_ident() == self._thread
            if self._failure is None:
                self._end(failed(error, self.rank))
            assert self._failure is not None
            return None if self._failure.rank == self.rank else self._failure

    def _close(self, failure: Failed | None = None) -> None:
        if self.size > 1:
            if failure is not None:
                end_later(failure, self.rank, 2 * GRACE_S)
                abort_groups(GRACE_S)
            elif dist.is_initialized():
                if not self._dismissed:
                    self.dismiss()
                dist.destroy_process_group()
        with self._news:
            self._closed = True
            self._news.notify_all()
        if self._link is not None:
            self._link.close()

    # -- in the link's thread

    def _on_message(self, rank: int, message: Any) -> None:
        with self._news:
            match message:
                case Said():
                    self._said.setdefault(message.number, {})[rank] = message.value
                case Agreed():
                    self._agreed[message.number] = message.value
                case Dismissed():
                    self._dismissed, self.dismissed_with = True, message.code
                    self._tasks.append(message)
                case Task():
                    self._tasks.append(message)
                case Post():
                    self._posts.append(message.value)
                case Failed():
                    self._end(message)
            self._news.notify_all()

    def _on_lost(self, rank: int, how: str) -> None:
        with self._news:
            if not self._dismissed:
                self._end(Failed(rank=rank, error=GangError(f"rank {rank} {how}", rank=rank), lost=True))
                self._news.notify_all()

    def _end(self, failure: Failed) -> None:
        """The first failure counts: pass it on, free collectives that will never complete."""
        if self._failure is not None or self._closed:
            return
        self._failure = failure
        if self._link is not None and (self.leads or failure.rank == self.rank):
            self._link.send_all(failure)
        threading.Thread(target=self._end_hard, name="gang-end", daemon=True).start()

    def _end_hard(self) -> None:
        time.sleep(_NOTICE_S)
        if not self._closed:
            abort_groups(GRACE_S)
        time.sleep(GRACE_S)
        ends = time.monotonic() + UNWIND_S
        while self._noticed and not self._closed and time.monotonic() < ends:
            time.sleep(0.1)
        if not self._closed and self._failure is not None:
            end_now(self._failure, self.rank)

    @property
    def speaks(self) -> bool:
        """Whether it is this rank's part to tell the user of the failure."""
        return self.leads if self._failure is None else self._failure.speaks(self.rank)

    # -- waiting

    def _answer(self) -> Any:
        """Rank 0's answer, however long it takes: its end would be heard of."""
        number = self._number
        self._wait(lambda: number in self._agreed, None)
        with self._news:
            return self._agreed.pop(number)

    def _wait(self, ready: Callable[[], bool], timeout_s: float | None) -> bool:
        with self._news:
            arrived = self._news.wait_for(lambda: ready() or self._failure is not None, timeout_s)
            if self._failure is not None and not ready():
                self._noticed |= threading.get_ident() == self._thread
                raise self._failure.error
            return arrived


def join(timeout_s: float = TIMEOUT_S, heartbeat_s: float = HEARTBEAT_S, lost_after_s: float = LOST_AFTER_S) -> Gang:
    """Meet the other processes that a launcher started (torchrun, Ray Train): what they set in the environment says
    who they are. Without a launcher, a gang of one.

    Args:
        timeout_s: for a collective, and for a rank that does not answer.
        heartbeat_s, lost_after_s: between signs of life, and without one; see Link.

    Raises:
        WorkerError: the others were not met in time.
    """
    here = place()
    if not here.is_one_of_many:
        return Gang()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(here.local_rank % torch.cuda.device_count())
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")  # as the rollout that waits for it: streams.py
    if not dist.is_initialized():
        dist.init_process_group(group_backend(on_gpu=cuda), timeout=datetime.timedelta(seconds=timeout_s))
    gang = Gang(here.rank, here.size, here.local_rank, timeout_s)
    connections = _meet(here, timeout_s)
    gang._link = Link(connections, gang._on_message, gang._on_lost, heartbeat_s, lost_after_s)
    gang._link.start()
    return gang


def group_backend(*, on_gpu: bool) -> str:
    """What the processes of a gang talk through: NCCL for tensors on GPUs, gloo for those on the CPU."""
    return "cpu:gloo,cuda:nccl" if on_gpu else "gloo"


def _meet(here: Place, timeout_s: float) -> dict[int, Connection]:
    door = Door("127.0.0.1" if here.local_size == here.size else here.address) if here.rank == 0 else None
    invitation: list[Any] = [None if door is None else door.invitation]
    # a launcher may have made a group that has no CPU side
    group = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None
    dist.broadcast_object_list(invitation, src=0, group=group, device=torch.device("cpu"))
    if door is None:
        return {0: knock(invitation[0], here.rank, timeout_s)}
    return door.admit(here.size, timeout_s)
