"""Self-attention of one block over its planned history, from encoded pages.

For each layer: materialise a chunk of history into the scratch, attend, merge by log-sum-exp; the block's own keys and
values join the last chunk. When a history fits the scratch there is one chunk and nothing to merge. How rows stand in
the scratch and which kernels attend them is the attention path's::

    chunk    form 2: 4 blocks, merged                            attend, lse + log(tokens that one stands for)
    chunk    form 0: 5 blocks | form 1: 2 blocks | own block     attend, merge

Shape legend: B batch (1), T tokens of a block, H heads, D head dim, N history blocks, G arena slots, X scratch rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from longtake.engine.history import Plan
from longtake.engine.timing import NO_TIMER, StageTimer
from longtake.kernels.attention import merge
from longtake.kernels.attention_path import AttentionPath
from longtake.kernels.forms import Form
from longtake.kernels.rotary import THETA, HeadRotary, Rotary, Turns


class Pages(Protocol):
    """Readable blocks of one plan in one form."""

    @property
    def streamed(self) -> bool:
        """Whether a layer's pages come when it is asked for, and go when another one is."""

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Arena uint8 [G, H, P] and the int32 [N] slots of the planned blocks, in order."""


class Readable(Protocol):
    """Readable history of one plan: what the cache's ``prepare`` returns."""

    @property
    def parts(self) -> Sequence[Pages | None]:
        """By form; None: the plan reads no block in it."""


class Page(Protocol):
    """Writable pages of one block in one form."""

    def page(self, layer: int) -> Tensor:
        """uint8 [H, P] to be filled with the block's payloads of ``layer``."""


class Commit(Protocol):
    """Writable pages of one block: what the cache's ``begin_commit`` returns."""

    @property
    def parts(self) -> Sequence[Page | None]:
        """By form; None: the block is not kept in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Blocks of one form in a chunk: those from ``first`` to ``last`` of the plan's in that form, from ``row`` on."""

    form: int
    first: int
    last: int
    row: int
    rotary: Turns


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """What is attended together; each row has the mass of ``mass`` tokens."""

    parts: tuple[_Part, ...] = ()
    num_rows: int = 0
    mass: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _FixedPages:
    """Pages, by layer, whose slots are rewritten for each pass."""

    of_layer: Sequence[tuple[Tensor, Tensor]]
    streamed: bool = False

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.of_layer[layer]


@dataclass(frozen=True, slots=True, kw_only=True)
class _OwnPages:
    """Pages of no cache's, one tensor a layer."""

    pages_LHP: Sequence[Tensor]

    def page(self, layer: int) -> Tensor:
        return self.pages_LHP[layer]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fixed:
    """A reading, or a commit, of whichever block comes."""

    parts: Sequence[Any]


class HistoryAttention:
    """The ``attend`` of all passes of one block; give it to the model.

    It reads the cache and, in the commit pass, fills the pages of a commit. It never copies, evicts or concatenates.

    Args:
        plan: of the block.
        reading: the planned blocks' pages; may be None when the plan has no history.
        forms: that blocks are kept in; the first has every token.
        block_frames: latent frames of a block; the plan says how many blocks are computed together.
        path: how history is unpacked and attended; shared by all blocks of the rollout, as is its scratch.
        device: of the model.
        timer: where time goes, for benchmarks.
        thetas: bases of RoPE's speeds in time, one for all heads that are attended here or one each.
    """

    def __init__(
        self,
        plan: Plan,
        reading: Readable | None,
        forms: Sequence[Form],
        block_frames: int,
        path: AttentionPath,
        device: torch.device,
        timer: StageTimer = NO_TIMER,
        thetas: Sequence[float] = (THETA,),
    ) -> None:
        self._thetas = thetas
        self._reading = reading
        self._forms, self._block_frames = forms, block_frames
        self._path, self._device = path, device
        self._timer = timer
        self._commit: Commit | None = None
        self._summarise: Callable[[Tensor], None] | None = None
        self._own_rotary = self._rotary(0, [plan.start + index * block_frames for index in range(plan.own_blocks)])
        self._chunks = self._plan_chunks(plan)

    def _rotary(self, form: int, starts: Sequence[float]) -> Turns:
        frames = [start + frame for start in starts for frame in range(self._block_frames)]
        return self._forms[form].rotary(frames, self._device, self._thetas)

    def _plan_chunks(self, plan: Plan) -> list[_Chunk]:
        """Merged blocks first, apart for their mass; then the others, as many as fit beside the own blocks."""
        forms, path = self._forms, self._path
        starts: list[list[float]] = [[] for _ in forms]
        for form, start in zip(plan.forms or (0,) * len(plan.starts), plan.starts, strict=True):
            starts[form].append(start)
        chunks, whole = [], []
        for form, of_form in enumerate(starts):
            places = [(form, index) for index in range(len(of_form))]
            if forms[form].mass == 1:
                whole += places
                continue
            fitting = path.num_rows // forms[form].num_tokens
            chunks += [self._chunk(places[at : at + fitting], starts) for at in range(0, len(places), fitting)]
        fitting = path.num_rows // forms[0].num_tokens - plan.own_blocks
        chunks += [self._chunk(whole[at : at + fitting], starts) for at in range(0, len(whole), fitting)]
        return chunks if whole else [*chunks, _Chunk()]

    def _chunk(self, places: Sequence[tuple[int, int]], starts: Sequence[Sequence[float]]) -> _Chunk:
        """The chunk of some blocks, each named by form and place among the plan's of that form."""
        parts, row = [], 0
        for form, run in groupby(places, key=lambda place: place[0]):
            indices = [index for _, index in run]
            first, last = indices[0], indices[-1] + 1
            parts.append(
                _Part(form=form, first=first, last=last, row=row, rotary=self._rotary(form, starts[form][first:last]))
            )
            row += len(indices) * self._forms[form].num_tokens
        return _Chunk(parts=tuple(parts), num_rows=row, mass=self._forms[places[0][0]].mass)

    def committing(self, commit: Commit, summarise: Callable[[Tensor], None] | None = None) -> HistoryAttention:
        """The same attention for the commit pass: each layer's K and V are encoded into ``commit``'s pages.

        Args:
            commit: to be filled.
            summarise: given the first layer's keys [T, H, D].
        """
        self._commit, self._summarise = commit, summarise
        return self

    # -- the same for any block: what a recorded pass needs

    @property
    def commits(self) -> bool:
        """Whether this is the commit pass."""
        return self._commit is not None

    @property
    def shape(self) -> Hashable | None:
        """Equal for passes that attend by the same kernels, whose `inputs` differ; None: no two passes do.

        That is so when pages come through a ring, a codec cannot be recorded, a retriever takes a summary, or
        somebody times the stages.
        """
        parts = [] if self._reading is None else [part for part in self._reading.parts if part is not None]
        if (
            self._timer is not NO_TIMER
            or self._summarise is not None
            or any(part.streamed for part in parts)
            or not all(form.codec.recordable for form in self._forms)
        ):
            return None
        chunks = tuple(
            (chunk.num_rows, chunk.mass, tuple((part.form, part.first, part.last, part.row) for part in chunk.parts))
            for chunk in self._chunks
        )
        arenas = tuple(part.pages(0)[0].data_ptr() for part in parts)
        return chunks, arenas, tuple(table.shape for table in self._tables())

    @property
    def kept_forms(self) -> tuple[bool, ...]:
        """By form, whether a commit pass keeps the block in it; empty for other passes."""
        return () if self._commit is None else tuple(part is not None for part in self._commit.parts)

    def _tables(self) -> list[Tensor]:
        turns = [self._own_rotary, *(part.rotary for chunk in self._chunks for part in chunk.parts)]
        return [one.temporal_YP2 for turn in turns for one in (turn.heads if isinstance(turn, HeadRotary) else (turn,))]

    def _slots(self, num_layers: int) -> list[Tensor]:
        parts = () if self._reading is None else self._reading.parts
        return [part.pages(layer)[1] for part in parts if part is not None for layer in range(num_layers)]

    def _pages(self, num_layers: int) -> list[Tensor]:
        parts = () if self._commit is None else self._commit.parts
        return [part.page(layer) for part in parts if part is not None for layer in range(num_layers)]

    def fixed(self, num_layers: int) -> HistoryAttention:
        """A pass of this `shape` whose inputs are overwritten for each block; a commit fills pages of its own."""
        fixed = copy.copy(self)
        fixed._own_rotary = _own_tables(self._own_rotary)
        fixed._chunks = [
            replace(chunk, parts=tuple(replace(part, rotary=_own_tables(part.rotary)) for part in chunk.parts))
            for chunk in self._chunks
        ]
        layers = range(num_layers)
        if self._reading is not None:
            fixed._reading = _Fixed(parts=[part and _own_slots(part, num_layers) for part in self._reading.parts])
        if self._commit is not None:
            fixed._commit = _Fixed(
                parts=[
                    part and _OwnPages(pages_LHP=[torch.empty_like(part.page(layer)) for layer in layers])
                    for part in self._commit.parts
                ]
            )
        return fixed

    def page_bytes(self, num_layers: int) -> int:
        """Bytes of the pages that this pass fills."""
        return sum(page.nbytes for page in self._pages(num_layers))

    def take_inputs(self, other: HistoryAttention, num_layers: int) -> None:
        """Overwrite the inputs of a `fixed` pass by those of another of its shape."""
        torch._foreach_copy_(self._tables(), other._tables())
        if slots := self._slots(num_layers):
            torch._foreach_copy_(slots, other._slots(num_layers))

    def give_pages(self, other: HistoryAttention, num_layers: int) -> None:
        """Copy what a `fixed` commit pass encoded into another's pages."""
        if self.commits:
            torch._foreach_copy_(other._pages(num_layers), self._pages(num_layers))

    def __call__(self, layer: int, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        """Attend history and own block; q, k normed and unrotated; returns [1, T, H, D]."""
        q_THD, k_THD, v_THD = q_BTHD[0], k_BTHD[0], v_BTHD[0]
        path, timer = self._path, self._timer
        if self._commit is not None:
            with timer("encode"):
                self._encode(self._commit, layer, k_THD, v_THD)
            if layer == 0 and self._summarise is not None:
                self._summarise(k_THD)
        with timer("rotary"):
            path.begin(q_THD, k_THD, v_THD, self._own_rotary)
        out_HTD = lse_HT = None
        for chunk in self._chunks:
            rows = chunk.num_rows
            if rows:
                with timer("materialise"):
                    self._write(chunk, layer)
            if chunk is self._chunks[-1]:
                with timer("rotary"):
                    path.write_own(rows)
                rows += q_THD.shape[0]
            with timer("attention"):
                part_HTD, part_lse_HT = path.attend(rows)
                if chunk.mass > 1:
                    part_lse_HT = part_lse_HT + math.log(chunk.mass)
                if out_HTD is None or lse_HT is None:
                    out_HTD, lse_HT = part_HTD, part_lse_HT
                else:
                    out_HTD, lse_HT = merge(out_HTD, lse_HT, part_HTD, part_lse_HT)
        path.finish()
        assert out_HTD is not None
        return out_HTD.transpose(0, 1)[None]

    def _encode(self, commit: Commit, layer: int, k_THD: Tensor, v_THD: Tensor) -> None:
        for form, part in zip(self._forms, commit.parts, strict=True):
            if part is not None:
                page_HP = part.page(layer)
                form.encode(layer, k_THD, v_THD, page_HP)

    def _write(self, chunk: _Chunk, layer: int) -> None:
        assert self._reading is not None, "a plan with history needs a reading"
        for part in chunk.parts:
            pages = self._reading.parts[part.form]
            assert pages is not None, "the reading has the plan's forms"
            pages_GHP, slots_N = pages.pages(layer)
            codec = self._forms[part.form].of_layer(layer)
            self._path.write_history(pages_GHP, slots_N[part.first : part.last], part.rotary, codec=codec, row=part.row)


def _own_slots(part: Pages, num_layers: int) -> _FixedPages:
    """The same pages, by slots of its own."""
    pages = [part.pages(layer) for layer in range(num_layers)]
    return _FixedPages(of_layer=[(pages_GHP, slots_N.clone()) for pages_GHP, slots_N in pages])


def _own_tables(turns: Turns) -> Turns:
    """Tables whose part in time is a tensor of its own."""
    if isinstance(turns, HeadRotary):
        return HeadRotary(heads=tuple(_own_table(one) for one in turns.heads))
    return _own_table(turns)


def _own_table(rotary: Rotary) -> Rotary:
    return replace(rotary, temporal_YP2=rotary.temporal_YP2.clone())
