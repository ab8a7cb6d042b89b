"""Self-attention of one block over its planned history, from encoded pages.

For each layer: materialise a chunk of history into the scratch, attend, merge by log-sum-exp; the block's own keys and
values join the last chunk. When a history fits the scratch there is one chunk and nothing to merge. How rows stand in
the scratch and which kernels attend them is the attention path's.

Shape legend: B batch (1), T tokens of a block, H heads, D head dim, N history blocks, G arena slots, X scratch rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from longtake.engine.history import Plan
from longtake.engine.timing import NO_TIMER, StageTimer
from longtake.kernels.attention import merge
from longtake.kernels.attention_path import AttentionPath
from longtake.kernels.codec import Codec
from longtake.kernels.rotary import Rotary, rotary_table


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


class HistoryAttention:
    """The ``attend`` of all passes of one block; give it to the model.

    It reads the cache and, in the commit pass, fills the pages of a commit. It never copies, evicts or concatenates.

    Args:
        plan: of the block.
        reading: the planned blocks' pages; may be None when the plan has no history.
        codec: that wrote them and will write the block's own.
        grid: token rows and columns of a latent frame.
        block_frames: latent frames of a block; the plan says how many blocks are computed together.
        path: how history is unpacked and attended; shared by all blocks of the rollout, as is its scratch.
        device: of the model.
        timer: where time goes, for benchmarks.
        first_head: the model's number of the first head that is attended here.
    """

    def __init__(
        self,
        plan: Plan,
        reading: Pages | None,
        codec: Codec,
        grid: tuple[int, int],
        block_frames: int,
        path: AttentionPath,
        device: torch.device,
        timer: StageTimer = NO_TIMER,
        first_head: int = 0,
    ) -> None:
        self._reading = reading
        self._first_head = first_head
        self._codec = codec
        self._path = path
        self._timer = timer
        self._tokens = codec.geometry.num_tokens
        self._commit: Commit | None = None
        self._summarise: Callable[[Tensor], None] | None = None

        def table(starts: Sequence[float]) -> Rotary:
            frames = [start + frame for start in starts for frame in range(block_frames)]
            return rotary_table(frames, *grid, codec.geometry.head_dim, device)

        self._own_rotary = table([plan.start + index * block_frames for index in range(plan.own_blocks)])
        per_chunk = path.num_rows // self._tokens - plan.own_blocks
        self._chunks = [
            (first, min(first + per_chunk, len(plan.starts)), table(plan.starts[first : first + per_chunk]))
            for first in range(0, len(plan.starts), per_chunk)
        ]

    def committing(self, commit: Commit, summarise: Callable[[Tensor], None] | None = None) -> HistoryAttention:
        """The same attention for the commit pass: each layer's K and V are encoded into ``commit``'s pages.

        Args:
            commit: to be filled.
            summarise: given the first layer's keys [T, H, D].
        """
        self._commit, self._summarise = commit, summarise
        return self

    def __call__(self, layer: int, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        """Attend history and own block; q, k normed and unrotated; returns [1, T, H, D]."""
        q_THD, k_THD, v_THD = q_BTHD[0], k_BTHD[0], v_BTHD[0]
        path, timer = self._path, self._timer
        if self._commit is not None:
            with timer("encode"):
                page_HP, block = self._commit.page(layer), self._commit.block
                self._codec.encode(k_THD, v_THD, page_HP, block=block, layer=layer, first_head=self._first_head)
            if layer == 0 and self._summarise is not None:
                self._summarise(k_THD)
        with timer("rotary"):
            path.begin(q_THD, k_THD, v_THD, self._own_rotary)
        out_HTD = lse_HT = None
        for first, last, rotary in self._chunks or [(0, 0, self._own_rotary)]:
            rows = (last - first) * self._tokens
            if rows:
                assert self._reading is not None, "a plan with history needs a reading"
                pages_GHP, slots_N = self._reading.pages(layer)
                with timer("materialise"):
                    path.write_history(pages_GHP, slots_N[first:last], rotary)
            if not self._chunks or last == self._chunks[-1][1]:
                with timer("rotary"):
                    path.write_own(rows)
                rows += q_THD.shape[0]
            with timer("attention"):
                part_HTD, part_lse_HT = path.attend(rows)
                if out_HTD is None or lse_HT is None:
                    out_HTD, lse_HT = part_HTD, part_lse_HT
                else:
                    out_HTD, lse_HT = merge(out_HTD, lse_HT, part_HTD, part_lse_HT)
        assert out_HTD is not None
        return out_HTD.transpose(0, 1)[None]
