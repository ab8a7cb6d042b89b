"""Self-attention of one block over its planned history, from encoded pages.

For each layer: materialise a chunk of history into the scratch, attend, merge by log-sum-exp; the block's own keys and
values join the last chunk. When a history fits the scratch there is one chunk and nothing to merge.

Shape legend: B batch (1), T tokens of a block, H heads, D head dim, N history blocks, G arena slots, X scratch rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from longtake.engine.history import Plan
from longtake.engine.timing import NO_TIMER, StageTimer
from longtake.kernels.attention import attend, merge
from longtake.kernels.codec import Codec
from longtake.kernels.rotary import Rotary, apply_rotary, rotary_table


class Pages(Protocol):
    """Readable history of one plan: what the cache's ``prepare`` returns."""

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Arena uint8 [G, H, P] and the int32 [N] slots of the planned blocks, in order."""


class Commit(Protocol):
    """Writable pages of one block: what the cache's ``begin_commit`` returns."""

    @property
    def block(self) -> int: ...

    def page(self, layer: int) -> Tensor:
        """uint8 [H, P] to be filled with the block's payloads of ``layer``."""


class Scratch:
    """The dense keys and values of one chunk of one layer: two buffers [H, X, D], allocated once.

    Args:
        num_heads, head_dim: of this rank.
        num_tokens: rows X; at least two blocks, one of history and the block itself.
        dtype, device: of the model.
    """

    def __init__(
        self, num_heads: int, num_tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.k_HXD = torch.empty(num_heads, num_tokens, head_dim, dtype=dtype, device=device)
        self.v_HXD = torch.empty_like(self.k_HXD)

    @property
    def num_bytes(self) -> int:
        """Bytes of both buffers."""
        return 2 * self.k_HXD.numel() * self.k_HXD.element_size()


class HistoryAttention:
    """The ``attend`` of all passes of one block; give it to the model.

    It reads the cache and, in the commit pass, fills the pages of a commit. It never copies, evicts or concatenates.

    Args:
        plan: of the block.
        reading: the planned blocks' pages; ignored when the plan has no history.
        codec: that wrote them and will write the block's own.
        grid: token rows and columns of a latent frame.
        block_frames: latent frames of a block.
        scratch: shared by all blocks of the rollout.
        timer: where time goes, for benchmarks.
    """

    def __init__(
        self,
        plan: Plan,
        reading: Pages | None,
        codec: Codec,
        grid: tuple[int, int],
        block_frames: int,
        scratch: Scratch,
        timer: StageTimer = NO_TIMER,
    ) -> None:
        self._reading = reading
        self._codec = codec
        self._scratch = scratch
        self._timer = timer
        self._tokens = codec.geometry.num_tokens
        self._commit: Commit | None = None
        device, head_dim = scratch.k_HXD.device, scratch.k_HXD.shape[-1]

        def table(starts: Sequence[int]) -> Rotary:
            frames = [start + frame for start in starts for frame in range(block_frames)]
            return rotary_table(frames, *grid, head_dim, device)

        self._own_rotary = table([plan.start])
        per_chunk = scratch.k_HXD.shape[1] // self._tokens - 1
        self._chunks = [
            (first, min(first + per_chunk, len(plan.starts)), table(plan.starts[first : first + per_chunk]))
            for first in range(0, len(plan.starts), per_chunk)
        ]

    def committing(self, commit: Commit) -> HistoryAttention:
        """The same attention for the commit pass: each layer's K and V are encoded into ``commit``'s pages."""
        self._commit = commit
        return self

    def __call__(self, layer: int, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        """Attend history and own block; q, k normed and unrotated; returns [1, T, H, D]."""
        q_THD, k_THD, v_THD = q_BTHD[0], k_BTHD[0], v_BTHD[0]
        if self._commit is not None:
            with self._timer("encode"):
                self._codec.encode(k_THD, v_THD, self._commit.page(layer), block=self._commit.block, layer=layer)
        with self._timer("rotary"):
            q_HTD = apply_rotary(q_THD, self._own_rotary).transpose(0, 1)
            own_k_HTD = apply_rotary(k_THD, self._own_rotary).transpose(0, 1)
        k_HXD, v_HXD = self._scratch.k_HXD, self._scratch.v_HXD
        out_HTD = lse_HT = None
        for first, last, rotary in self._chunks or [(0, 0, self._own_rotary)]:
            rows = (last - first) * self._tokens
            if rows:
                assert self._reading is not None, "a plan with history needs a reading"
                pages_GHP, slots_N = self._reading.pages(layer)
                with self._timer("materialise"):
                    self._codec.materialise(pages_GHP, slots_N[first:last], rotary, k_HXD[:, :rows], v_HXD[:, :rows])
            if not self._chunks or last == self._chunks[-1][1]:
                k_HXD[:, rows : rows + self._tokens] = own_k_HTD
                v_HXD[:, rows : rows + self._tokens] = v_THD.transpose(0, 1)
                rows += self._tokens
            with self._timer("attention"):
                part_HTD, part_lse_HT = attend(q_HTD, k_HXD[:, :rows], v_HXD[:, :rows])
                if out_HTD is None or lse_HT is None:
                    out_HTD, lse_HT = part_HTD, part_lse_HT
                else:
                    out_HTD, lse_HT = merge(out_HTD, lse_HT, part_HTD, part_lse_HT)
        assert out_HTD is not None
        return out_HTD.transpose(0, 1)[None]
