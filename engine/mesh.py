"""Which ranks of a gang hold which heads and tokens, and the collectives along each axis of that mesh.

A gang of ``tp * sp`` ranks stands on two axes. Along ``tp`` (tensor parallelism) the weights are split by heads; along
``sp`` (Ulysses) each layer's tokens are split outside attention and its heads inside. Heads are dealt in rank order, so
every rank's are consecutive, whatever the axes::

    12 heads, tp=2, sp=2      rank 0          rank 1          rank 2          rank 3
    weights of heads          0 .. 5          0 .. 5          6 .. 11         6 .. 11
    attends, caches, stores   0 .. 2          3 .. 5          6 .. 8          9 .. 11
    tokens outside attention  first half      second half     first half      second half

Shape legend: T tokens, M width, n ranks of an axis.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from longtake.kernels.errors import ConfigError

# One collective that takes longer means a rank that will never come; the first blocks compile, at different speeds.
TIMEOUT_S = 300.0


def share(total: int, index: int, count: int) -> range:
    """The ``index``-th of ``count`` nearly equal consecutive parts of ``range(total)``."""
    return range(total * index // count, total * (index + 1) // count)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshShape:
    """Ranks along each axis; no tensor, no process group.

    Args:
        tp: ranks that share the weights.
        sp: ranks that share the tokens.
        split_norms: tokens are split along ``tp`` too outside the projections (sequence-parallel norms): reduce-scatter
            and all-gather in place of all-reduce.
    """

    tp: int = 1
    sp: int = 1
    split_norms: bool = False

    @property
    def size(self) -> int:
        """Ranks of the gang."""
        return self.tp * self.sp

    def check(self, num_heads: int) -> None:
        """Raise unless a model's heads can be dealt to this mesh.

        Raises:
            ConfigError: names the gang sizes that can.
        """
        if self.tp < 1 or self.sp < 1 or num_heads % self.size:
            fitting = [size for size in range(1, num_heads + 1) if num_heads % size == 0]
            raise ConfigError(
                f"a gang of {self.size} (tp={self.tp}, sp={self.sp}) cannot share {num_heads} heads evenly; "
                f"use one of {', '.join(map(str, fitting))} processes"
            )

    def coordinates(self, rank: int) -> tuple[int, int]:
        """(index along tp, index along sp) of a rank."""
        return divmod(rank, self.sp)

    def heads(self, rank: int, num_heads: int) -> range:
        """The model's heads that a rank attends, caches and stores."""
        return share(num_heads, rank, self.size)

    def weight_heads(self, rank: int, num_heads: int) -> range:
        """The model's heads whose weights a rank holds: those of all ranks that share its tokens."""
        return share(num_heads, self.coordinates(rank)[0], self.tp)


def parse_mesh(text: str) -> MeshShape:
    """A mesh written as ``tp=2,sp=2``, ``sp=4`` or ``tp=4,norms``.

    Raises:
        ConfigError: it is not.
    """
    sizes = {"tp": 1, "sp": 1}
    split_norms = False
    for part in text.replace(" ", "").split(","):
        if part == "norms":
            split_norms = True
        elif matched := re.fullmatch(r"(tp|sp)=([1-9]\d{0,3})", part):
            sizes[matched[1]] = int(matched[2])
        else:
            raise ConfigError(f"a mesh is written like sp=4, tp=4 or tp=2,sp=2 (and norms), not {text!r}")
    return MeshShape(tp=sizes["tp"], sp=sizes["sp"], split_norms=split_norms)


def default_mesh(num_ranks: int) -> MeshShape:
    """All ranks along ``sp``: two collectives a layer, where tensor parallelism has five and saves weights."""
    return MeshShape(sp=num_ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis of the mesh as one rank sees it; collectives run on the current stream's order and return at once.

    They are functional operators, so that ``torch.compile`` takes them into its graphs. On an axis of one rank each
    returns its input.

    Args:
        index: of this rank on the axis.
        size: ranks on the axis, n.
        group: name of the process group; empty on an axis of one rank.
    """

    index: int = 0
    size: int = 1
    group: str = ""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the axis, in place where nothing is compiled: use the result only."""
        return x if self.size == 1 else wait(self.start_all_reduce(x))

    def start_all_reduce(self, x: Tensor) -> Tensor:
        """As ``all_reduce``, but the result may be read only after :func:`wait`: work between the two overlaps."""
        if self.size == 1:
            return x
        name = "all_reduce" if torch.compiler.is_compiling() else "all_reduce_"
        started: Tensor = getattr(torch.ops._c10d_functional, name)(x, "sum", self.group)
        return started

    def all_gather(self, x: Tensor) -> Tensor:
        """[a, ...] of each rank to [n * a, ...] on all, in the axis's order; ``x`` contiguous."""
        if self.size == 1:
            return x
        return wait(torch.ops._c10d_functional.all_gather_into_tensor(x, self.size, self.group))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum [n * a, ...] over the axis; this rank's [a, ...] of it."""
        if self.size == 1:
            return x
        return wait(torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", self.size, self.group))

    def all_to_all(self, x: Tensor) -> Tensor:
        """Part ``i`` of ``x`` [n, ...] goes to rank ``i``; part ``i`` of the result came from it; ``x`` contiguous."""
        return x if self.size == 1 else wait(self.start_all_to_all(x))

    def start_all_to_all(self, x: Tensor) -> Tensor:
        """As ``all_to_all``, to be waited for: work between the two overlaps."""
        if self.size == 1:
            return x
        assert x.is_contiguous(), "NCCL refuses what gloo copies"
        ones = [1] * self.size
        started: Tensor = torch.ops._c10d_functional.all_to_all_single(x, ones, ones, self.group)
        return started


def wait(started: Tensor) -> Tensor:
    """Let the current stream wait for a started collective; returns its result. Anything else passes through."""
    done: Tensor = torch.ops._c10d_functional.wait_tensor(started)
    return done


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """A gang's mesh as one rank sees it."""

    shape: MeshShape
    rank: int
    tp: Axis
    sp: Axis

    def heads(self, num_heads: int) -> range:
        """The model's heads that this rank attends, caches and stores."""
        return self.shape.heads(self.rank, num_heads)


ALONE = Mesh(shape=MeshShape(), rank=0, tp=Axis(), sp=Axis())


def open_mesh(shape: MeshShape, timeout_s: float = TIMEOUT_S) -> Mesh:
    """Make the process groups of a mesh over the default group; every rank calls it, at the same point.

    Args:
        shape: as many ranks as the default process group has.
        timeout_s: after which a collective that not all ranks joined is an error.

    Raises:
        ConfigError: the gang has another size.
    """
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    if shape.size != num_ranks:
        raise ConfigError(f"a mesh of tp={shape.tp} x sp={shape.sp} needs {shape.size} processes, not {num_ranks}")
    tp_index, sp_index = shape.coordinates(rank)
    rows = [[row * shape.sp + column for column in range(shape.sp)] for row in range(shape.tp)]
    columns = [list(ranks) for ranks in zip(*rows, strict=True)]
    timeout = datetime.timedelta(seconds=timeout_s)

    def axis(lines: list[list[int]], line: int, index: int) -> Axis:
        if len(lines[0]) == 1:
            return Axis()
        groups = [dist.new_group(ranks, timeout=timeout) for ranks in lines]
        return Axis(index=index, size=len(lines[0]), group=groups[line].group_name)

    sp = axis(rows, tp_index, sp_index)
    tp = axis(columns, sp_index, tp_index)
    return Mesh(shape=shape, rank=rank, tp=tp, sp=sp)
