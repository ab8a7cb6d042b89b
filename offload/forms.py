"""A cache of several forms of each block: one KVCache a form, read and committed as one.

    FormCache   form 0: KVCache, all blocks             journal, kv.zarr             in the shot's folder
                form 1: KVCache, blocks 0 2 4 ..        journal, kv.zarr             in forms/<name>
                form 2: ...

Every form has its own arena, host pool and folder. The first form has every block; another has those that a later block
reads in it, numbered without gaps, which is known before the shot starts. A block is committed when every form that it
is to have is; what only some of the forms have after a crash is rolled back when the folders are opened.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from types import TracebackType

from torch import Tensor

from longtake.kernels.errors import ConfigError, StorageError
from longtake.offload.cache import CacheStats, Commit, KVCache, Reading, TierUse
from longtake.offload.chunkfiles import DiskIO
from longtake.offload.pages import form_and_block
from longtake.offload.run import RunDirectory, committed_blocks
from longtake.offload.shape import ModelKVShape
from longtake.offload.store import Payloads

FORMS_FOLDER = "forms"


def num_whole(counts: Sequence[int], kept: Sequence[Sequence[int]], total: int) -> int:
    """Blocks from 0 on that have all their forms.

    Args:
        counts: how many blocks each form has.
        kept: the blocks that each form is to have, ascending.
        total: blocks of the whole rollout.
    """
    return min(
        (blocks[count] if count < len(blocks) else total for count, blocks in zip(counts, kept, strict=True)),
        default=total,
    )


def blocks_by_form(pages: Iterable[int], kept: Sequence[Sequence[int]]) -> list[list[int]]:
    """Pages as each form numbers its blocks, in their order.

    Raises:
        ConfigError: a block is not kept in that form.
    """
    found: list[list[int]] = [[] for _ in kept]
    for number in pages:
        form, block = form_and_block(number)
        index = bisect_left(kept[form], block)
        if index == len(kept[form]) or kept[form][index] != block:
            raise ConfigError(f"block {block} is not kept in form {form}")
        found[form].append(index)
    return found


class FormReading:
    """Pages of one plan, readable until `release`; a context manager."""

    def __init__(self, readings: Sequence[Reading | None]) -> None:
        """Made by `FormCache.prepare`."""
        self.parts = tuple(readings)

    def release(self) -> None:
        """Let the blocks go; a second call does nothing."""
        for part in self.parts:
            if part is not None:
                part.release()

    def __enter__(self) -> FormReading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class FormCommit:
    """A block that is being encoded in all its forms; ends with `complete` or `abort`."""

    def __init__(self, block: int, commits: Sequence[Commit | None]) -> None:
        """Made by `FormCache.begin_commit`."""
        self.block, self.parts = block, tuple(commits)

    def attach(self, summary_HS: Tensor) -> None:
        """As `Commit.attach`, with the first form."""
        assert self.parts[0] is not None, "the first form has every block"
        self.parts[0].attach(summary_HS)

    def complete(self) -> None:
        """Make the block part of the history in all its forms."""
        for part in reversed(self.parts):
            if part is not None:
                part.complete()

    def abort(self) -> None:
        """Drop the block; does nothing when the commit has ended."""
        for part in self.parts:
            if part is not None:
                part.abort()


class FormCache:
    """KVCache's interface over several of them; `blocks` are pages (`longtake.offload.pages`). Threads as KVCache."""

    def __init__(
        self, caches: Sequence[KVCache], *, names: Sequence[str], kept: Sequence[Sequence[int]], total: int
    ) -> None:
        """Take over caches, opened on forms that are rolled back to the same block.

        Args:
            caches: one a form.
            names: of the forms.
            kept: the blocks that each form is to have, ascending; the first has all.
            total: blocks of the whole rollout.

        Raises:
            StorageError: the forms do not hold the same blocks.
        """
        self.caches, self._names, self._kept, self._total = tuple(caches), tuple(names), tuple(kept), total
        for form, (cache, blocks) in enumerate(zip(caches, kept, strict=True)):
            if cache.num_committed != bisect_left(blocks, self.num_committed):
                raise StorageError(
                    f"form {names[form]} of the history has {cache.num_committed} blocks, not as many "
                    "as the first; render the shot anew with --fresh"
                )

    @property
    def num_committed(self) -> int:
        """Blocks committed so far in all their forms; the next commit is of this number."""
        return num_whole([cache.num_committed for cache in self.caches], self._kept, self._total)

    @property
    def durable_blocks(self) -> int:
        """Blocks from 0 on that would survive the process in all their forms; 0 without a disk."""
        if self.caches[0].durable_blocks == 0:
            return 0
        return num_whole([cache.durable_blocks for cache in self.caches], self._kept, self._total)

    def memory(self) -> dict[str, int]:
        """Every byte that the caches hold, by name; those of other forms than the first with the form's."""
        held = dict(self.caches[0].memory())
        for name, cache in zip(self._names[1:], self.caches[1:], strict=True):
            held.update({f"{key} {name}": size for key, size in cache.memory().items()})
        return held

    def stats(self) -> CacheStats:
        """Counters so far, of all forms together; the lags are the longest."""
        all_of = [cache.stats() for cache in self.caches]
        longest = {name: max(getattr(stats, name) for stats in all_of) for name in ("last_lag_s", "max_lag_s")}
        names = [field.name for field in fields(CacheStats) if field.name not in (*longest, "num_written")]
        sums = {name: sum(getattr(stats, name) for stats in all_of) for name in names}
        return CacheStats(**sums, **longest, num_written=all_of[0].num_written)

    def tiers(self) -> dict[str, TierUse]:
        """How full each tier is, all forms together, by name."""
        all_of = [cache.tiers() for cache in self.caches]
        found = {}
        for name in all_of[0]:
            uses = [tiers[name] for tiers in all_of]
            budgets = [use.budget_bytes for use in uses if use.budget_bytes is not None]
            found[name] = TierUse(
                used_bytes=sum(use.used_bytes for use in uses),
                budget_bytes=sum(budgets) if len(budgets) == len(uses) else None,
            )
        return found

    def claim_summaries(self) -> list[Payloads]:
        """As `KVCache.claim_summaries`, of the first form."""
        return self.caches[0].claim_summaries()

    def prepare(self, blocks: Sequence[int]) -> FormReading:
        """As `KVCache.prepare`, for pages; those of one form keep their order."""
        with ExitStack() as undo:
            readings: list[Reading | None] = []
            for cache, wanted in zip(self.caches, self._by_form(blocks), strict=True):
                readings.append(undo.enter_context(cache.prepare(wanted)) if wanted else None)
            undo.pop_all()
        return FormReading(readings)

    def schedule(self, plans: Iterable[Sequence[int]]) -> None:
        """As `KVCache.schedule`, for pages."""
        by_form = [self._by_form(plan) for plan in plans]
        for form, cache in enumerate(self.caches):
            cache.schedule([plan[form] for plan in by_form])

    def retain(self, blocks: Collection[int]) -> None:
        """As `KVCache.retain`, for pages."""
        for cache, wanted in zip(self.caches, self._by_form(blocks), strict=True):
            cache.retain(wanted)

    def drop(self, blocks: Collection[int]) -> None:
        """As `KVCache.drop`, for pages."""
        for cache, doomed in zip(self.caches, self._by_form(blocks), strict=True):
            cache.drop(doomed)

    @property
    def disk_room_blocks(self) -> float:
        """As `KVCache.disk_room_blocks`, of the form that has the least."""
        return min(cache.disk_room_blocks for cache in self.caches)

    def begin_commit(self, block: int) -> FormCommit:
        """As `KVCache.begin_commit`, in all forms that the block is to have."""
        if block != self.num_committed:
            raise ConfigError(f"commits come in order: block {self.num_committed} is next, not {block}")
        with ExitStack() as undo:
            commits: list[Commit | None] = []
            for cache, blocks in zip(self.caches, self._kept, strict=True):
                index = bisect_left(blocks, block)
                if index < len(blocks) and blocks[index] == block:
                    commit = cache.begin_commit(index)
                    undo.callback(commit.abort)
                    commits.append(commit)
                else:
                    commits.append(None)
            undo.pop_all()
        return FormCommit(block, commits)

    def flush(self) -> None:
        """As `KVCache.flush`."""
        for cache in self.caches:
            cache.flush()

    def close(self, *, drain: bool = True) -> None:
        """As `KVCache.close`."""
        with ExitStack() as closing:
            for cache in self.caches:
                closing.callback(cache.close, drain=drain)

    def _by_form(self, pages: Iterable[int]) -> list[list[int]]:
        return blocks_by_form(pages, self._kept)


def open_runs(
    path: Path,
    *,
    shapes: Sequence[ModelKVShape],
    names: Sequence[str],
    kept: Sequence[Sequence[int]],
    total: int,
    config_hash: str,
    rank: int = 0,
    num_ranks: int = 1,
    agree: Callable[[int], int] = lambda num_blocks: num_blocks,
    meet: Callable[[int], int] = lambda num_blocks: num_blocks,
    reads: Callable[[int], Iterable[int]] = lambda num_blocks: (),
    disk_io: DiskIO = DiskIO.SYSTEM,
) -> tuple[RunDirectory, ...]:
    """Open a shot's folder for one rank: that of each form, rolled back to what all of them have.

    Args:
        path: the folder, which is the first form's.
        shapes, names: of the forms.
        kept, total: as for `FormCache`.
        config_hash, rank, num_ranks: as for `RunDirectory`.
        reads: which pages the blocks behind so many read; folders that have dropped one are refused.
        disk_io: as for `RunDirectory`.
        agree: the blocks of those that all forms have that the gang goes on from; called once, by every rank.
        meet: the gang's minimum of equal numbers, which holds each rank until all are there; called once for each
            further form.

    Raises:
        LockedError, ConfigError, StorageError, DiskFullError: as `RunDirectory`.
    """
    folders = [path, *(path / FORMS_FOLDER / name for name in names[1:])]

    def agree_on_whole(num_blocks: int) -> int:
        others = [committed_blocks(folder, shapes[0].model_heads) for folder in folders[1:]]
        return agree(num_whole([num_blocks, *others], kept, total))

    def meet_at(form: int) -> Callable[[int], int]:
        return lambda _: meet(bisect_left(kept[form], runs[0].num_blocks))

    def open_form(form: int, agree: Callable[[int], int]) -> RunDirectory:
        return RunDirectory(
            folders[form],
            shape=shapes[form],
            config_hash=config_hash,
            rank=rank,
            num_ranks=num_ranks,
            agree=agree,
            num_blocks=len(kept[form]),
            reads=lambda count: blocks_by_form(reads(runs[0].num_blocks if runs else count), kept)[form],
            disk_io=disk_io,
        )

    runs: list[RunDirectory] = []
    with ExitStack() as undo:
        for form in range(len(folders)):
            runs.append(open_form(form, meet_at(form) if form else agree_on_whole))
            undo.callback(runs[-1].close, orderly=False)
        undo.pop_all()
    return tuple(runs)


def make_form_cache(
    make: Callable[[int], KVCache], *, names: Sequence[str], kept: Sequence[Sequence[int]], total: int
) -> FormCache:
    """Make one cache a form, by its number; what was made is closed when another one fails."""
    with ExitStack() as undo:
        caches: list[KVCache] = []
        for form in range(len(names)):
            caches.append(make(form))
            undo.callback(caches[-1].close, drain=False)
        cache = FormCache(caches, names=names, kept=kept, total=total)
        undo.pop_all()
    return cache
