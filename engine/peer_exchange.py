"""Ulysses' exchanges through memory that the GPUs of one machine write into each other (symmetric memory).

A collective wants what it sends packed by rank, and gives what it received in that order; here each value is stored
once, where it will be read, and a barrier of a few microseconds stands for the rest. What arrives is the same, bit for
bit.

One buffer for each of the two exchanges is enough, since they take turns: whoever writes into a rank's buffer of the
one exchange has passed the barrier of the other, which that rank joined after it had read the former. ::

    store q, k, v --barrier--> attend: reads them --> store its result --barrier--> the layer goes on: reads it --> ...

Without multicast, which longtake leaves off. Source: PyTorch's torch.distributed._symmetric_memory.

Shape legend: as in kernels/exchange_triton.py.
"""

from __future__ import annotations

import logging
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longtake.engine.mesh import TIMEOUT_S, Axis
from longtake.engine.place import place
from longtake.engine.ulysses import TokenLayout
from longtake.kernels.head_dims import HEAD_DIMS

_log = logging.getLogger(__name__)


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


def open_exchange(
    axis: Axis, layout: TokenLayout, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> PeerExchange | None:
    """Make the exchange where all ranks of the axis are GPUs of one machine that reach each other's memory.

    Every rank calls it, at the same point. None, on all of them: collectives it is, which reach anywhere; so it is
    with LONGTAKE_PEER_MEMORY=0 as well.

    Args:
        axis, layout, num_heads, head_dim, dtype, device: as for PeerExchange.
    """
    if axis.size == 1 or device.type != "cuda" or head_dim not in HEAD_DIMS:
        return None
    group = process_group(axis)
    wanted = place().peer_memory
    hosts: list[Any] = [None] * axis.size
    dist.all_gather_object(hosts, (socket.gethostname(), wanted), group=group)
    if len(set(hosts)) > 1 or not wanted:
        return None
    made, reason = None, ""
    try:
        made = PeerExchange(axis, layout, num_heads, head_dim, dtype, device)
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
