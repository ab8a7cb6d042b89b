"""The causal Wan model on one rank of a mesh: its heads' weights, its tokens, and the collectives in between.

Along ``tp`` (Megatron, arXiv 1909.08053; sequence-parallel norms, arXiv 2205.05198): q, k, v and the feed-forward's
first matrix are split by columns, o and the second one by rows, so that only the results of the latter are summed. The
norms of q and k run over the full width: the sum of squares of each token is summed over the ranks, that of q and of k
in one small all-reduce which the projection to v hides. Cross-attention is split alike, and keeps the K/V of its own
heads. What all ranks need whole is on all of them: embeddings, time modulation, norms, the last projection.

    x [t, M] --gather*--> q k v of own heads --sum of squares--> norm --> attend --> o --sum or scatter*--> added to x

Starred: with ``split_norms`` what lies between the projections runs on a share of the tokens, all-gathered before and
reduce-scattered after them; without, it runs on all of them and the starred steps are nothing and an all-reduce.

Parameters have the names of CausalWan's, so that weights load from the same files, each rank its slices.

Shape legend: B batch (1), t tokens of this rank outside the projections, T tokens inside them, M width, h own heads.
"""

from __future__ import annotations

import math
import re
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.engine.config import ModelConfig
from longtake.engine.mesh import Axis, Mesh, share, wait
from longtake.engine.model import (
    Attend,
    CausalWan,
    FeedForward,
    GELUProjection,
    Rows,
    TextContext,
)
from longtake.engine.peer_exchange import PeerExchange, PeerSums, open_exchange, open_sums
from longtake.engine.timing import NO_TIMER, StageTimer
from longtake.engine.ulysses import HeadExchange, TokenLayout
from longtake.kernels.fp8_rows import Rounded

_FP8_UNIT = 16
_COLUMNS = re.compile(r"blocks\.\d+\.(attn[12]\.(to_[qkv]|norm_[qk])|ffn\.net\.0\.proj)\.(weight|bias)$")
_ROWS = re.compile(r"blocks\.\d+\.(attn[12]\.to_out\.0|ffn\.net\.2)\.weight$")


class Joint:
    """Where tokens and sums meet between the projections of a layer.

    Args:
        axis: tp.
        split: whether tokens are split outside the projections (``split_norms``).
    """

    def __init__(self, axis: Axis, split: bool) -> None:
        self.axis, self.split = axis, split and axis.size > 1
        self.first = axis.index == 0
        self.peers: PeerSums | None = None  # what split tokens are exchanged through; None: collectives

    def gather(self, x: Rows) -> Rows:
        """[1, t, M] to [1, T, M], shares in order of rank; rounded rows travel as such."""
        if not self.split:
            return x
        if self.peers is not None:
            return self.peers.all_gather(x)
        if isinstance(x, Rounded):
            rows = self.axis.all_gather(x.rows[0].view(torch.uint8)).view(x.rows.dtype)
            return Rounded(rows[None], self.axis.all_gather(x.scale[0])[None])
        return self.axis.all_gather(x[0].contiguous())[None]

    def sum(self, partial_BTM: Tensor) -> Tensor:
        """The ranks' partial sums [1, T, M] to the sum of this rank's tokens [1, t, M]."""
        if self.peers is not None:
            return self.peers.reduce_scatter(partial_BTM)
        if self.split:
            return self.axis.reduce_scatter(partial_BTM[0].contiguous())[None]
        return self.axis.all_reduce(partial_BTM)


class RowLinear(nn.Linear):
    """A linear layer of which this rank has some input columns; the results are summed over the ranks."""

    def __init__(self, in_features: int, out_features: int, joint: Joint) -> None:
        super().__init__(in_features, out_features)
        self.joint = joint

    def forward(self, x: Tensor) -> Tensor:
        """[1, T, own inputs] to [1, t, outputs]; the bias is added once."""
        return self.joint.sum(F.linear(x, self.weight, self.bias if self.joint.first else None))


class ShardedRMSNorm(nn.Module):
    """RMS norm over the full width of which this rank has some channels.

    Args:
        own: channels here.
        full: channels of the model.
        eps: of the norm.
    """

    def __init__(self, own: int, full: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(own))
        self.full, self.eps = full, eps

    @staticmethod
    def squares(x: Tensor) -> Tensor:
        """Sum of squares of the own channels, float32 [..., 1]."""
        return x.float().square().sum(-1, keepdim=True)

    def scale(self, x: Tensor, squares: Tensor) -> Tensor:
        """``x`` normed by the full width's sum of squares, in its own dtype."""
        normed: Tensor = x.float() * torch.rsqrt(squares / self.full + self.eps) * self.weight.float()
        return normed.to(x.dtype)


class ShardedAttention(nn.Module):
    """What Attention is, for the own heads."""

    def __init__(self, config: ModelConfig, heads: range, joint: Joint) -> None:
        super().__init__()
        dim, own = config.dim, len(heads) * config.head_dim
        self.num_heads = len(heads)
        self.joint = joint
        self.to_q = nn.Linear(dim, own)
        self.to_k = nn.Linear(dim, own)
        self.to_v = nn.Linear(dim, own)
        self.to_out = nn.ModuleList([RowLinear(own, dim, joint)])
        self.norm_q = ShardedRMSNorm(own, dim, config.eps)
        self.norm_k = ShardedRMSNorm(own, dim, config.eps)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, h*D] -> [B, T, h, D], a view."""
        return x.view(*x.shape[:-1], self.num_heads, -1)

    def query(self, x: Rows) -> Tensor:
        """Normed queries [1, T, h, D] of ``x`` [1, t, M]."""
        q = self.to_q(self.joint.gather(x))
        squares = self.joint.axis.all_reduce(self.norm_q.squares(q))
        return self.split(self.norm_q.scale(q, squares))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of a text, which every rank has whole."""
        k = self.to_k(x)
        squares = self.joint.axis.start_all_reduce(self.norm_k.squares(k))
        v = self.to_v(x)
        return self.split(self.norm_k.scale(k, self._wait(squares))), self.split(v)

    def query_key_value(self, x: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Normed queries and keys and plain values, [1, T, h, D] each, of ``x`` [1, t, M]."""
        x = self.joint.gather(x)
        q, k = self.to_q(x), self.to_k(x)
        squares = self.joint.axis.start_all_reduce(torch.stack((self.norm_q.squares(q), self.norm_k.squares(k))))
        v = self.to_v(x)
        q_squares, k_squares = self._wait(squares).unbind(0)
        q, k = self.norm_q.scale(q, q_squares), self.norm_k.scale(k, k_squares)
        return self.split(q), self.split(k), self.split(v)

    def _wait(self, started: Tensor) -> Tensor:
        return started if self.joint.axis.size == 1 else wait(started)


class ShardedFeedForward(FeedForward):
    """Some hidden channels of the feed-forward."""

    def __init__(self, dim: int, own: int, joint: Joint) -> None:
        nn.Module.__init__(self)
        self.net = nn.ModuleList([GELUProjection(dim, own), nn.Identity(), RowLinear(own, dim, joint)])
        self.joint = joint

    def forward(self, x: Rows) -> Tensor:
        return super().forward(self.joint.gather(x))


def _hidden(ffn_dim: int, axis: Axis) -> range:
    """The feed-forward's hidden channels of this rank, in sixteens if it has such: FP8 matrix units take no others."""
    unit = math.gcd(ffn_dim, _FP8_UNIT)
    own = share(ffn_dim // unit, axis.index, axis.size)
    return range(own.start * unit, own.stop * unit)


class ShardedWan(CausalWan):
    """The denoiser on one rank of a gang; every rank calls it with the same latents and gets the same flow.

    ``attend`` is given all tokens of this rank's :attr:`heads`, ``text_context`` holds the heads whose weights are
    here. Make it on the meta device: weights come from files or are drawn later.

    Args:
        config: of the whole model.
        mesh: of the gang.

    Raises:
        ConfigError: the heads cannot be dealt to this mesh.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        mesh.shape.check(config.num_heads)
        super().__init__(config)
        self.mesh = mesh
        self.timer: StageTimer = NO_TIMER
        self._compiled = False
        self._exchanges: dict[TokenLayout, PeerExchange | None] = {}
        self._ffn = _hidden(config.ffn_dim, mesh.tp)
        self._weight_heads = mesh.shape.weight_heads(mesh.rank, config.num_heads)
        self._joint = Joint(mesh.tp, mesh.shape.split_norms)
        self._sums: dict[TokenLayout, PeerSums | None] = {}
        if mesh.tp.size == 1:
            return
        for block in self.blocks:
            block.attn1 = ShardedAttention(config, self._weight_heads, self._joint)
            block.attn2 = ShardedAttention(config, self._weight_heads, self._joint)
            block.ffn = ShardedFeedForward(config.dim, len(self._ffn), self._joint)

    def compile_layers(self) -> None:
        super().compile_layers()
        self._compiled = True

    @property
    def heads(self) -> range:
        return self.mesh.heads(self.config.num_heads)

    def sum_ranks(self, x: Tensor) -> Tensor:
        parts = self.mesh.tp.all_gather(self.mesh.sp.all_gather(x.contiguous()[None]))
        return reduce(torch.add, parts.unbind(0))  # in order of rank, so that ranks agree bit for bit

    def own_part(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's slice of a tensor of the whole model, by its name; a view where the slice is contiguous."""
        channels, head_dim = range(tensor.shape[0]), self.config.head_dim
        if _COLUMNS.match(name) or _ROWS.match(name):
            heads = self._weight_heads
            channels = self._ffn if ".ffn." in name else range(heads.start * head_dim, heads.stop * head_dim)
        if _ROWS.match(name):
            return tensor[:, channels.start : channels.stop].contiguous()
        return tensor[channels.start : channels.stop]

    def forward(
        self,
        latents_BCFYX: Tensor,
        timesteps_BF: Tensor,
        context: TextContext,
        attend: Attend,
        text_mask_B1TK: Tensor | None = None,
    ) -> Tensor:
        """As CausalWan's, for one film at a time; every rank must call it.

        Raises:
            NotImplementedError: a batch or a text mask, which are for training.
        """
        if latents_BCFYX.shape[0] != 1 or text_mask_B1TK is not None:
            raise NotImplementedError("a sharded model renders one film at a time, without a mask over the text")
        patch_f, patch_y, patch_x = self.config.patch_size
        _, _, frames, rows, columns = latents_BCFYX.shape
        layout = self._layout(frames // patch_f, (rows // patch_y) * (columns // patch_x))
        self._open_peers(layout, latents_BCFYX.dtype, latents_BCFYX.device)
        peers = self._exchanges[layout]
        exchange = HeadExchange(self.mesh, layout, self.timer, compiled=self._compiled, peers=peers)
        return super().forward(latents_BCFYX, timesteps_BF, context, exchange.around(attend))

    @property
    def exchange_bytes(self) -> int:
        """Device memory of buffers that other ranks write into; not the caching allocator's."""
        opened = (*self._exchanges.values(), *self._sums.values())
        return sum(one.num_bytes for one in opened if one is not None)

    def _open_peers(self, layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> None:
        """What this layout's tokens are exchanged through, made when it is first seen."""
        mesh, config = self.mesh, self.config
        if layout not in self._exchanges:
            heads = len(self._weight_heads)
            self._exchanges[layout] = open_exchange(mesh.sp, layout, heads, config.head_dim, dtype, device)
            rows = layout.num_frames * layout.share_tokens
            self._sums[layout] = open_sums(mesh.tp, rows, config.dim, dtype, device) if layout.tp > 1 else None
        self._joint.peers = self._sums[layout]

    def take_share(self, x_BTM: Tensor, num_frames: int) -> Tensor:
        layout = self._layout(num_frames, x_BTM.shape[1] // num_frames)
        return layout.take(x_BTM, self.mesh.sp.index * layout.tp + (self.mesh.tp.index if layout.tp > 1 else 0))

    def join_shares(self, x_BTP: Tensor, num_tokens: int, num_frames: int) -> Tensor:
        layout = self._layout(num_frames, num_tokens // num_frames)
        if layout.num_shares == 1:
            return x_BTP
        x = x_BTP[0].contiguous()
        if layout.tp > 1:
            x = self.mesh.tp.all_gather(x)
        x = self.mesh.sp.all_gather(x)
        return layout.whole(x.unflatten(0, (layout.num_shares, -1)))[None]

    def _layout(self, num_frames: int, frame_tokens: int) -> TokenLayout:
        return TokenLayout.of(self.mesh.shape, num_frames, frame_tokens)
