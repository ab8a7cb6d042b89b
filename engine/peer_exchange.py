"""Exchanges through memory that the GPUs of one machine write into each other's (symmetric memory).

A collective wants what it sends packed by rank, and gives what it received in that order; here each value is stored
once, where it will be read, and a barrier of a few microseconds stands for the rest. What arrives is the same, bit for
bit; sums over ranks are taken in float32 and in their order.

Exchanges come in pairs that take turns, so that one buffer for each is enough: whoever writes into a rank's buffer of
the one exchange has passed the barrier of the other, which that rank joined after it had read the former. ::

    Ulysses   store q, k, v --barrier--> attend: reads them --> store its result --barrier--> the layer reads it --> ...
    tensor    store rows --barrier--> copy them --> matrices --> store partial sums --barrier--> add them up --> ...

Without multicast, which longtake leaves off. Source: PyTorch's torch.distributed._symmetric_memory.

Shape legend: as in kernels/exchange_triton.py.
"""

from __future__ import annotations

import itertools
import logging
import socket
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longtake.engine.mesh import TIMEOUT_S, Axis
from longtake.engine.model import Rows
from longtake.engine.place import place
from longtake.engine.ulysses import TokenLayout
from longtake.kernels.fp8_rows import Rounded
from longtake.kernels.head_dims import HEAD_DIMS

_log = logging.getLogger(__name__)
Made = TypeVar("Made")


class _Peers:
    """A buffer on each rank of an axis, which all ranks write; every rank makes it, at the same point.

    Raises:
        RuntimeError: the GPUs cannot.
    """

    def __init__(self, axis: Axis, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.own: Tensor = symmetric.empty(shape, dtype=dtype, device=device)
        self._handle: Any = symmetric.rendezvous(self.own, process_group(axis))
        self.own.zero_()  # padding is never written
        self.addresses_n = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)

    def meet(self) -> None:
        """On the current stream: wait until all ranks have come here, and what they wrote is there."""
        self._handle.barrier(channel=0, timeout_ms=int(1000 * TIMEOUT_S))


class PeerExchange:
    """Both exchanges of a layer; made by `open_exchange`.

    Results are overwritten by the next layer's exchange of the same kind.

    Args:
        axis: sp.
        layout: of a block's tokens.
        num_heads: before the exchange, H.
        head_dim: 64 or 128.
        dtype, device: of q, k and v.

    Raises:
        RuntimeError: the GPUs cannot write into each other's memory.
    """

    def __init__(
        self, axis: Axis, layout: TokenLayout, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._axis, own = axis, num_heads // axis.size
        rows = layout.tp * layout.num_frames * layout.share_tokens
        tokens = layout.num_frames * layout.frame_tokens
        self._heads = _Peers(axis, (3, tokens, own, head_dim), dtype, device)
        self._tokens = _Peers(axis, (rows, num_heads, head_dim), dtype, device)
        self._sizes = {
            "m": layout.tp,
            "F": layout.num_frames,
            "S": layout.frame_tokens,
            "s": layout.share_tokens,
            "h": own,
        }

    @property
    def num_bytes(self) -> int:
        """Device memory held; not the caching allocator's."""
        return self._heads.own.nbytes + self._tokens.own.nbytes

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [1, m*t, H, D] of this rank's tokens to [1, T, h, D] of its heads each."""
        from longtake.kernels import exchange_triton

        if not q.stride() == k.stride() == v.stride():
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        exchange_triton.to_heads(q[0], k[0], v[0], self._heads.addresses_n, self._axis.index, self._sizes)
        self._heads.meet()
        q, k, v = self._heads.own.unsqueeze(1).unbind(0)
        return q, k, v

    def to_tokens(self, out: Tensor) -> Tensor:
        """Attention's result [1, T, h, D] to [1, m*t, H, D]."""
        from longtake.kernels import exchange_triton

        exchange_triton.to_tokens(out[0], self._tokens.addresses_n, self._axis.index, self._sizes)
        self._tokens.meet()
        return self._tokens.own[None]


class PeerSums:
    """What tensor parallelism with split norms exchanges: rows gathered before matrices, partial sums scattered after.

    It stands in compiled graphs: its two operators are opaque to torch.compile, and give new tensors.

    Args:
        axis: tp.
        num_rows: of a share, t.
        width: of a row, M, a multiple of 16.
        dtype, device: of rows and sums.

    Raises:
        RuntimeError: the GPUs cannot write into each other's memory.
    """

    def __init__(self, axis: Axis, num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.axis, self.shape = axis, (num_rows, width)
        self._gathered = _Peers(axis, (axis.size * num_rows * (width * dtype.itemsize + 16),), torch.uint8, device)
        self._partial = _Peers(axis, (axis.size, num_rows, width), dtype, device)
        self._key = next(_keys)
        _open_sums[self._key] = self

    @property
    def num_bytes(self) -> int:
        """Device memory held; not the caching allocator's."""
        return self._gathered.own.nbytes + self._partial.own.nbytes

    def all_gather(self, x: Rows) -> Rows:
        """[1, t, M] to [1, n*t, M], shares in order of rank."""
        if isinstance(x, Rounded):
            rows, scale = torch.ops.longtake.gather_rounded(x.rows[0], x.scale[0], self._key)
            return Rounded(rows[None], scale[None])
        gathered: Tensor = torch.ops.longtake.gather_rows(x[0].contiguous(), self._key)
        return gathered[None]

    def reduce_scatter(self, partial: Tensor) -> Tensor:
        """The ranks' [1, n*t, M] to the sum of this rank's share, [1, t, M]."""
        total: Tensor = torch.ops.longtake.scatter_sums(partial[0].contiguous(), self._key)
        return total[None]

    def gathered(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Each of some [t, ...] of every rank, [n*t, ...], with one barrier."""
        from longtake.kernels import exchange_triton

        peers, offset, found = self._gathered, 0, []
        for part in parts:
            exchange_triton.spread(part, peers.addresses_n, self.axis.index, each=False, offset_bytes=offset)
            size = self.axis.size * part.nbytes
            whole = peers.own[offset : offset + size].view(part.dtype).view(self.axis.size * len(part), -1)
            offset += -(-size // 16) * 16
            found.append(whole)
        peers.meet()
        return [one.clone() for one in found]

    def summed(self, partial: Tensor) -> Tensor:
        """As `reduce_scatter`, without the first dimension."""
        from longtake.kernels import exchange_triton

        exchange_triton.spread(partial, self._partial.addresses_n, self.axis.index, each=True)
        self._partial.meet()
        return exchange_triton.sum_parts(self._partial.own)


_keys = itertools.count()
_open_sums: weakref.WeakValueDictionary[int, PeerSums] = weakref.WeakValueDictionary()  # operators know them by number


@torch.library.custom_op("longtake::gather_rows", mutates_args=())
def _gather_rows(x: Tensor, key: int) -> Tensor:
    return _open_sums[key].gathered([x])[0]


@torch.library.custom_op("longtake::gather_rounded", mutates_args=())
def _gather_rounded(rows: Tensor, scale: Tensor, key: int) -> tuple[Tensor, Tensor]:
    whole, scales = _open_sums[key].gathered([rows, scale])
    return whole, scales


@torch.library.custom_op("longtake::scatter_sums", mutates_args=())
def _scatter_sums(partial: Tensor, key: int) -> Tensor:
    return _open_sums[key].summed(partial)


@_gather_rows.register_fake
def _(x: Tensor, key: int) -> Tensor:
    return x.new_empty(_open_sums[key].axis.size * x.shape[0], x.shape[1])


@_gather_rounded.register_fake
def _(rows: Tensor, scale: Tensor, key: int) -> tuple[Tensor, Tensor]:
    num_rows = _open_sums[key].axis.size * rows.shape[0]
    return rows.new_empty(num_rows, rows.shape[1]), scale.new_empty(num_rows, 1)


@_scatter_sums.register_fake
def _(partial: Tensor, key: int) -> Tensor:
    return partial.new_empty(_open_sums[key].shape)


def open_exchange(
    axis: Axis, layout: TokenLayout, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> PeerExchange | None:
    """Ulysses' exchange, where `open_where_possible` makes one; arguments as for PeerExchange."""
    if head_dim not in HEAD_DIMS:
        return None
    return open_where_possible(axis, device, lambda: PeerExchange(axis, layout, num_heads, head_dim, dtype, device))


def open_sums(axis: Axis, num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> PeerSums | None:
    """Tensor parallelism's, where `open_where_possible` makes one; arguments as for PeerSums."""
    if width % 16:
        return None
    return open_where_possible(axis, device, lambda: PeerSums(axis, num_rows, width, dtype, device))


def open_where_possible(axis: Axis, device: torch.device, make: Callable[[], Made]) -> Made | None:
    """What ``make`` makes where all ranks of an axis are GPUs of one machine that reach each other's memory.

    Every rank calls it, at the same point. None, on all of them: collectives it is, which reach anywhere; so it is
    with LONGTAKE_PEER_MEMORY=0 as well.
    """
    if axis.size == 1 or device.type != "cuda":
        return None
    group = process_group(axis)
    wanted = place().peer_memory
    hosts: list[Any] = [None] * axis.size
    dist.all_gather_object(hosts, (socket.gethostname(), wanted), group=group)
    if len(set(hosts)) > 1 or not wanted:
        return None
    made, reason = None, ""
    try:
        made = make()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    reasons: list[Any] = [None] * axis.size
    dist.all_gather_object(reasons, reason, group=group)
    if any(reasons):
        _log.warning("GPUs cannot write into each other's memory, collectives are used: %s", max(reasons))
        return None
    return made


def process_group(axis: Axis) -> dist.ProcessGroup:
    """Of an axis of several ranks."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    group: dist.ProcessGroup = _resolve_process_group(axis.group)  # type: ignore[arg-type]
    return group
