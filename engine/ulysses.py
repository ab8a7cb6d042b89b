"""Ulysses (arXiv 2309.14509): tokens are split outside attention, heads inside; and how tokens are dealt to ranks.

A rank's share is the same part of every latent frame, so that whatever is done per latent frame (modulation, gates)
needs no index, and shares are equal on any gang size; the last one of a frame is padded where the tokens do not divide.
Two exchanges a layer: q, k, v of all heads of a share become those of some heads of all tokens; the result goes back::

    [share of tokens, all heads] -- all-to-all --> [all tokens, own heads] -- attend, all-to-all --> [share, all heads]

GPUs of one machine store into each other's memory (peer_exchange.py), others use all-to-all. Why torch's and not
DeepSpeed's DistributedAttention: docs/decisions/0010.

Shape legend: B batch (1), F latent frames, S tokens of a latent frame, s those of a share, t = F*s, T = F*S, M width,
H heads before the exchange, h = H/n after it, D head dim, n ranks along sp, m ranks along tp that split tokens too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from longtake.engine.compiling import compile_function
from longtake.engine.mesh import Axis, Mesh, MeshShape
from longtake.engine.model import Attend
from longtake.engine.timing import NO_TIMER, StageTimer

if TYPE_CHECKING:
    from longtake.engine.peer_exchange import PeerExchange


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLayout:
    """How the tokens of a block are dealt to the ranks of a mesh.

    Args:
        num_frames: latent frames, F.
        frame_tokens: tokens of one, S.
        sp: shares along sp, n.
        tp: shares along tp, m; 1 unless norms are split.
    """

    num_frames: int
    frame_tokens: int
    sp: int = 1
    tp: int = 1

    @classmethod
    def of(cls, shape: MeshShape, num_frames: int, frame_tokens: int) -> TokenLayout:
        """The layout on a mesh."""
        tp = shape.tp if shape.split_norms else 1
        return cls(num_frames=num_frames, frame_tokens=frame_tokens, sp=shape.sp, tp=tp)

    @property
    def num_shares(self) -> int:
        """Parts that each frame's tokens are split into."""
        return self.sp * self.tp

    @property
    def share_tokens(self) -> int:
        """Tokens of one frame in a share, padding included: s."""
        return math.ceil(self.frame_tokens / self.num_shares)

    def take(self, x_BTM: Tensor, index: int) -> Tensor:
        """A share of whole tokens: [B, T, M] to [B, t, M], contiguous."""
        if self.num_shares == 1:
            return x_BTM
        x_BFSM = self._padded(x_BTM.unflatten(1, (self.num_frames, -1)))
        part: Tensor = x_BFSM.unflatten(2, (self.num_shares, -1))[:, :, index]
        return part.flatten(1, 2).contiguous()

    def whole(self, shares: Tensor) -> Tensor:
        """All shares in order, [n*m, t, ...], to whole tokens [T, ...], contiguous, without the padding."""
        if self.num_shares == 1:
            return shares[0]
        x: Tensor = shares.unflatten(1, (self.num_frames, -1)).transpose(0, 1)  # F, n*m, s, ...
        x = x.flatten(1, 2)[:, : self.frame_tokens]
        return x.flatten(0, 1).contiguous()

    def shares(self, x: Tensor) -> Tensor:
        """Whole tokens [T, ...] to all shares in order: [n*m, t, ...], padded."""
        if self.num_shares == 1:
            return x[None]
        x_FS: Tensor = self._padded(x.unflatten(0, (self.num_frames, -1))[None])[0]
        dealt: Tensor = x_FS.unflatten(1, (self.num_shares, -1)).transpose(0, 1)
        return dealt.flatten(1, 2)

    def _padded(self, x_BFS: Tensor) -> Tensor:
        missing = self.num_shares * self.share_tokens - self.frame_tokens
        if not missing:
            return x_BFS
        return pad(x_BFS, (0, 0) * (x_BFS.ndim - 3) + (0, missing))


class HeadExchange:
    """Turns attention over whole tokens and own heads into attention over a share of tokens and more heads.

    Args:
        mesh: of the gang.
        layout: of the block's tokens.
        timer: where time goes, for benchmarks.
        compiled: fuse what reorders tokens before and after a collective, as the layers are compiled.
        peers: exchange through it; None: by collectives.
    """

    def __init__(
        self,
        mesh: Mesh,
        layout: TokenLayout,
        timer: StageTimer = NO_TIMER,
        *,
        compiled: bool = False,
        peers: PeerExchange | None = None,
    ) -> None:
        self._layout, self._timer = layout, timer
        if peers is not None:
            self._to_heads, self._to_tokens = peers.to_heads, peers.to_tokens
            return
        self._to_heads = partial(_compiled(to_heads) if compiled else to_heads, axis=mesh.sp, layout=layout)
        self._to_tokens = partial(_compiled(to_tokens) if compiled else to_tokens, axis=mesh.sp, layout=layout)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to exchange or to reorder."""
        return self._layout.num_shares == 1

    def around(self, attend: Attend) -> Attend:
        """``attend`` for q, k, v [1, m*t, H, D] of this rank's tokens; inside it they are [1, T, h, D]."""
        if self.idle:
            return attend

        def exchanged(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with self._timer("exchange"):
                inside = self._to_heads(q, k, v)
            out = attend(layer, *inside)
            with self._timer("exchange"):
                return self._to_tokens(out)

        return exchanged


def to_heads(q: Tensor, k: Tensor, v: Tensor, axis: Axis, layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, m*t, H, D] to [1, T, h, D] each, in one all-to-all."""
    # n (to), m*t, 3, h, D: what a rank receives from all others is then in the order of the shares
    send = torch.stack([x[0].unflatten(1, (axis.size, -1)).transpose(0, 1) for x in (q, k, v)], dim=2)
    received = axis.all_to_all(send).view(layout.num_shares, -1, *send.shape[2:])
    x_F, own = received.unflatten(1, (layout.num_frames, -1)), layout.frame_tokens
    # 3, F, n*m, s, h, D
    x = x_F.permute(3, 1, 0, 2, 4, 5).flatten(2, 3)[:, :, :own].flatten(1, 2).contiguous()
    return x[0][None], x[1][None], x[2][None]


def to_tokens(out: Tensor, axis: Axis, layout: TokenLayout) -> Tensor:
    """Attention's result [1, T, h, D] to [1, m*t, H, D], in one all-to-all."""
    send = layout.shares(out[0]).contiguous()
    received = axis.all_to_all(send.view(axis.size, -1, *send.shape[2:]))
    return received.transpose(0, 1).flatten(1, 2)[None]


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compile_function(function)
