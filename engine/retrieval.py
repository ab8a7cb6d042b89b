"""Top-k retrieval: which blocks from outside the window come back, chosen before a block begins.

What is remembered of every block are the means of its first layer's keys, normed and before RoPE, one vector a head. In
that layer keys depend on nothing but the block's own clean latents: not on the prompt, the history, or the codec. Where
the film now looks as it did once before, it is likely to go on as it did, or, when the camera turns round, as it came::

    film      a b c d e . . . . a b c |?        the last two blocks look like b c: d comes back, then e
              a b c d e . . . . e d c |?        like d c, passed the other way: b comes back

Blocks t-1 and t-2 are compared with all earlier ones of the scene, by squared distance, each head's divided by its mean
over those, so that all heads have the same say. Block m is as near as its two predecessors are, or its two successors
in reverse, whichever are nearer. The k nearest outside of sinks and window are chosen; of equals the newest. Why these
and not the queries of the block's first pass: docs/decisions/0030.

All work is queued on the current stream behind the commit pass of the block before, so that the choice is there, or
nearly, when the block begins; the one wait is for the event behind it.

Shape legend: E entries of the cache, H heads of this rank, D head dim, N blocks compared, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longtake.engine.config import HistoryPolicy, ShotConfig
from longtake.engine.history import Candidates
from longtake.engine.model import CausalWan
from longtake.engine.timeline import Entry, Timeline
from longtake.kernels.errors import StorageError
from longtake.offload.arena import to_device
from longtake.offload.cache import Commit, KVCache
from longtake.offload.forms import FormCache, FormCommit
from longtake.offload.lanes import Fence, mark
from longtake.offload.store import Payloads

_COMPARED_AT_ONCE = 512
_TINY = 1e-12


def summary_bytes(num_entries: int, num_heads: int, head_dim: int) -> int:
    """Device bytes of what is remembered of so many entries of a cache, for so many heads."""
    return num_entries * num_heads * head_dim * torch.float16.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Blocks that come back.

    Args:
        time: of the block that they come back for.
        times: ascending.
        onward: of each, where the film went from there: 1 forward, -1 backward.
    """

    time: int
    times: tuple[int, ...] = ()
    onward: tuple[int, ...] = ()

    def expected(self, time: int, times: range) -> tuple[int, ...]:
        """What a later block is likely to bring back, if the film goes on like this; ascending.

        Args:
            time: that block.
            times: what it may choose from.
        """
        ahead = time - self.time
        likely = {other + ahead * way for other, way in zip(self.times, self.onward, strict=True)}
        return tuple(sorted(likely.intersection(times)))


class Retriever:
    """What is remembered of each block, and the choices made from it. Work is issued on the current stream.

    Args:
        num_entries: of the cache in the end; memory for all of them is taken now.
        num_heads, head_dim: of this rank.
        count: blocks to choose, k.
        device: of the rollout.
        sum_ranks: adds up what the ranks of a gang computed from their heads, alike on all of them.
        known: summaries of the entries that are there already, as they were journaled.

    Raises:
        StorageError: those of some blocks are missing.
    """

    def __init__(
        self,
        *,
        num_entries: int,
        num_heads: int,
        head_dim: int,
        count: int,
        device: torch.device,
        sum_ranks: Callable[[Tensor], Tensor],
        known: Sequence[Payloads] = (),
    ) -> None:
        self._count, self._sum_ranks, self._device = count, sum_ranks, device
        self._means_EHD = torch.zeros((num_entries, num_heads, head_dim), dtype=torch.float16, device=device)
        self._pending: tuple[Candidates, Tensor, Fence] | None = None
        self._chosen_from: Candidates | None = None
        self._choice = Choice(time=-1)
        for entry, summary_HS in enumerate(known):
            if summary_HS.shape != (num_heads, 2 * head_dim):
                raise StorageError(
                    "the journal lacks what retrieval needs of a block; render the shot anew with --fresh", block=entry
                )
        if known:
            self._means_EHD[: len(known)].view(torch.uint8).copy_(torch.from_numpy(np.stack(known)))

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return self._means_EHD.nbytes

    def summarise(self, entry: int, k_THD: Tensor) -> Tensor:
        """Remember a block.

        Args:
            entry: of the cache.
            k_THD: keys of the first layer in its commit pass, normed and before RoPE.

        Returns:
            What must be kept with the block: uint8 [H, 2 D], float16 in memory's order; not written again.
        """
        self._means_EHD[entry] = k_THD.float().mean(0)
        return self._means_EHD[entry].view(torch.uint8)

    def look_ahead(self, candidates: Candidates) -> None:
        """Queue the choice for a block; the blocks before it have been remembered."""
        count = min(self._count, len(candidates.times))
        found = torch.empty((2, count), dtype=torch.int64, pin_memory=self._device.type == "cuda")
        if count:
            found.copy_(self._nearest(candidates, count), non_blocking=True)
        self._pending = (candidates, found, mark(self._device))

    def choose(self, candidates: Candidates) -> tuple[int, ...]:
        """The blocks that come back for a block, ascending; waits for the device, at most until it has chosen them."""
        if self._chosen_from != candidates:
            if self._pending is None or self._pending[0] != candidates:
                self.look_ahead(candidates)
            assert self._pending is not None
            _, found, fence = self._pending
            fence.synchronize()
            chosen = sorted(zip(*found.tolist(), strict=True))
            times, onward = tuple(time for time, _ in chosen), tuple(way for _, way in chosen)
            self._choice = Choice(time=candidates.time, times=times, onward=onward)
            self._chosen_from, self._pending = candidates, None
        return self._choice.times

    def expected(self, time: int, times: range) -> tuple[int, ...]:
        """What a block after the last one chosen for is likely to bring back; see `Choice.expected`."""
        return self._choice.expected(time, times)

    def _nearest(self, candidates: Candidates, count: int) -> Tensor:
        """int64 [2, count] on the device: blocks, nearest first, and where the film went from each."""
        last, before = self._distances(candidates)
        times = candidates.times
        index = torch.arange(times.start, times.stop, device=self._device) - candidates.first
        onward = last[(index - 1).clamp_min(0)] + before[(index - 2).clamp_min(0)]
        # in reverse, without the pairs in which a block would be compared with itself
        ends = len(last) - 1
        back = last[(index + 1).clamp_max(ends)] + before[(index + 2).clamp_max(ends)]
        back = back.masked_fill(index + 2 > ends - 2, torch.inf)
        nearness, newest_first = torch.minimum(onward, back).flip(0).sort(stable=True)
        del nearness
        chosen = len(times) - 1 - newest_first[:count]
        way = torch.where(onward <= back, 1, -1)[chosen]
        return torch.stack((chosen + times.start, way))

    def _distances(self, candidates: Candidates) -> Tensor:
        """float32 [2, N]: of the blocks one and two before to each of the scene, over the heads of all ranks."""
        entries, rows = candidates.entries, self._means_EHD
        last_two_2HD = torch.stack([rows[entries[-1]], rows[entries[-2]]]).float()
        parts = []
        for first in range(0, len(entries), _COMPARED_AT_ONCE):
            part = entries[first : first + _COMPARED_AT_ONCE]
            if isinstance(part, range):
                known_NHD = rows[part.start : part.stop]
            else:
                known_NHD = rows[to_device(torch.tensor(part), self._device)]
            parts.append((known_NHD.float()[None] - last_two_2HD[:, None]).square().sum(-1))
        distance_2NH = torch.cat(parts, dim=1)
        share_2NH = distance_2NH / distance_2NH.mean(1, keepdim=True).clamp_min(_TINY)
        return self._sum_ranks(share_2NH.sum(-1))


class Retrieval:
    """What comes back for each entry of a rollout; with another policy than retrieval nothing does.

    Args:
        shot: what is rendered.
        model: whose keys are remembered.
        timeline: of the shot.
        cache: of the history; what earlier runs remembered of its blocks is read.

    Raises:
        StorageError: blocks are there that nothing is remembered of.
    """

    def __init__(self, shot: ShotConfig, model: CausalWan, timeline: Timeline, cache: KVCache | FormCache) -> None:
        self._timeline = timeline
        self.last: tuple[int, ...] = ()
        self._retriever: Retriever | None = None
        if shot.history.policy is not HistoryPolicy.RETRIEVE:
            return
        known = cache.claim_summaries()
        if len(known) != cache.num_committed:
            known_of = f"{cache.num_committed} blocks are there and retrieval knows of {len(known)}"
            raise StorageError(f"{known_of}; render the shot anew with --fresh")
        self._retriever = Retriever(
            num_entries=timeline.num_entries,
            num_heads=len(model.heads),
            head_dim=model.config.head_dim,
            count=shot.history.retrieved_blocks,
            device=model.proj_out.weight.device,
            sum_ranks=model.sum_ranks,
            known=known,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of what is remembered, on the device."""
        return 0 if self._retriever is None else self._retriever.num_bytes

    def keeper(self, commit: Commit | FormCommit) -> Callable[[Tensor], None] | None:
        """What is to be given the first layer's keys [T, H, D] of a commit pass."""
        if (retriever := self._retriever) is None:
            return None
        return lambda k_THD: commit.attach(retriever.summarise(commit.block, k_THD))

    def look_ahead(self, index: int) -> None:
        """Queue the choice for an entry, when those before it are committed."""
        if self._retriever is None or index == self._timeline.num_entries:
            return
        entry = self._timeline.entry(index)
        if self._timeline.retrievable(entry):
            self._retriever.look_ahead(self._timeline.candidates(entry))

    def chosen(self, entry: Entry) -> tuple[int, ...]:
        """Blocks in time that come back for the entry whose turn it is, ascending; ``last`` keeps them."""
        self.last = ()
        if self._retriever is not None and self._timeline.retrievable(entry):
            self.last = self._retriever.choose(self._timeline.candidates(entry))
        return self.last

    def expected(self, entry: Entry) -> tuple[int, ...]:
        """Those that are likely to come back for an entry whose turn has not come."""
        if self._retriever is None:
            return ()
        return self._retriever.expected(entry.time, self._timeline.retrievable(entry))
