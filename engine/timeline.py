"""What a shot commits, in which order, and what each commit attends: known before the shot starts, without tensors.

The cache only ever grows: a block that is committed anew is another entry of it, and later plans read the newest one.
With two prefix blocks and a beat with ``recache`` at block 3 that replays two blocks::

    entry     0       1       2       3       4       5       6       7
    kind      prefix  prefix  render  render  render  replay  replay  render
    time      0       1       2       3       4       3       4       5      number of the block in time
    step      -2      -1      0       1       2       3       3       3      block of the shot that comes next
"""

from __future__ import annotations

import enum
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np

from longtake.engine import history
from longtake.engine.config import HistoryPolicy, Loop, ShotConfig, Switch, WriteBack
from longtake.engine.contradictions import check_settings
from longtake.engine.forms import LEFT_OUT, FormPolicy, Numbers
from longtake.engine.history import Candidates, Plan
from longtake.offload.pages import page

_KEPT_PLANS = 32


class Kind(enum.Enum):
    """PREFIX: latents that are there before the shot. RENDER: a block of the shot. REPLAY: one committed anew."""

    PREFIX = "prefix"
    RENDER = "render"
    REPLAY = "replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One commit.

    Args:
        index: in the cache.
        kind: why.
        time: number of the block in time, prefix first.
        step: block of the shot that is rendered next, or by this entry; negative in the prefix.
    """

    index: int
    kind: Kind
    time: int
    step: int


# Blocks in time that an entry, whose turn has not come, is likely to bring back.
Expected: TypeAlias = Callable[[Entry], tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replays:
    """Blocks ``first`` to ``first + count - 1`` in time, committed anew right before ``step``, from ``index`` on."""

    step: int
    index: int
    first: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """How an entry looks at the history.

    Args:
        versions: it sees the newest entries of blocks once those of this step are committed.
        own_blocks: computed together.
        first: the first block in time that it sees, but for sinks.
    """

    versions: int
    own_blocks: int = 1
    first: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Usage:
    """Who reads what, over a whole shot.

    Args:
        last_FE: for each form and entry the last entry that reads it so, or LEFT_OUT.
        most_held: for each form the most entries that are there to be read later.
        most_whole: the most entries of a plan that are not merged.
    """

    last_FE: Numbers
    most_held: tuple[int, ...]
    most_whole: int


class Timeline:
    """The commits of a shot.

    Args:
        shot: resolved.
        num_prefix: blocks that it starts from.

    Raises:
        ConfigError: settings that exclude each other.
    """

    def __init__(self, shot: ShotConfig, num_prefix: int) -> None:
        self._shot, self._history, self._prefix = shot, shot.history, num_prefix
        self._frames = shot.model.block_frames
        self._rolling = shot.sampler.loop is Loop.ROLLING
        self._rebuild = shot.sampler.write_back is WriteBack.REBUILD
        check_settings(shot)
        self.forms = FormPolicy(shot.history, shot.cache)
        self._made = lru_cache(maxsize=_KEPT_PLANS)(self._make_plan)
        self._beat_steps = tuple(
            bisect_left(range(shot.num_blocks), beat, key=shot.beat_of_block) for beat in range(len(shot.beats))
        )
        self._floors = [(step, kind) for step, kind in self._switches() if kind in (Switch.FLUSH, Switch.CUT)]
        self._replays: list[_Replays] = []
        added = 0
        for step, first, count in self._wanted_replays():
            self._replays.append(_Replays(step=step, index=num_prefix + step + added, first=first, count=count))
            added += count
        self._replay_steps = [replays.step for replays in self._replays]
        self._replay_indices = [replays.index for replays in self._replays]
        self._added = [0]
        for replays in self._replays:
            self._added.append(self._added[-1] + replays.count)
        self.num_entries = num_prefix + shot.num_blocks + added

    @property
    def replays(self) -> bool:
        """Whether any block is committed anew."""
        return bool(self._replays)

    def entry(self, index: int) -> Entry:
        """The commit of that number."""
        group = bisect_right(self._replay_indices, index) - 1
        if group >= 0:
            replays = self._replays[group]
            if index < replays.index + replays.count:
                time = replays.first + index - replays.index
                return Entry(index=index, kind=Kind.REPLAY, time=time, step=replays.step)
        time = index - self._added[group + 1]
        kind = Kind.PREFIX if time < self._prefix else Kind.RENDER
        return Entry(index=index, kind=kind, time=time, step=time - self._prefix)

    def index_of(self, step: int) -> int:
        """Entry that renders block ``step`` of the shot (or, negative, commits that block of the prefix)."""
        return self._prefix + step + self._added[bisect_right(self._replay_steps, step)]

    def num_known(self, num_blocks: int) -> int:
        """Entries that need no latents but those of the prefix and the shot's first ``num_blocks`` blocks."""
        return self.num_entries if num_blocks >= self._shot.num_blocks else self.index_of(num_blocks)

    def retrievable(self, entry: Entry) -> range:
        """Blocks in time of which an entry may bring some back; those of a cut or flushed scene stay away."""
        if entry.kind is Kind.REPLAY:
            return range(0)
        return history.retrievable(self._history, entry.time, self._floor(entry.step))

    def candidates(self, entry: Entry) -> Candidates:
        """The same, with what they are compared with."""
        first, times = self._floor(entry.step), range(self._floor(entry.step), entry.time)
        entries: Sequence[int] = times
        if self._replays:
            entries = tuple(self._newest(time, entry.step) for time in times)
        return Candidates(time=entry.time, first=first, times=self.retrievable(entry), entries=entries)

    def read_plan(self, entry: Entry, retrieved: tuple[int, ...] = ()) -> Plan:
        """What the denoising steps of a RENDER entry attend; ``retrieved`` are the blocks in time brought back."""
        return self._made(entry, self._read_view(entry), retrieved)

    def window_plan(self, entry: Entry, own_blocks: int) -> Plan:
        """As :meth:`read_plan`, for so many blocks together."""
        return self._made(entry, _View(versions=entry.step, own_blocks=own_blocks), ())

    def write_plan(self, entry: Entry, retrieved: tuple[int, ...] = ()) -> Plan:
        """What the pass attends that commits an entry; one committed anew sees only such and the sinks."""
        return self._made(entry, self._write_view(entry), retrieved)

    def _read_view(self, entry: Entry) -> _View:
        own = 1
        if self._rolling:
            own = min(len(self._shot.sampler.timesteps), self._shot.num_blocks - entry.step)
        return _View(versions=entry.step - 1 if self._rebuild else entry.step, own_blocks=own)

    def _write_view(self, entry: Entry) -> _View:
        first = 0
        if self._rebuild:
            first = entry.step + self._prefix - self._history.recent_blocks + 1
        elif entry.kind is Kind.REPLAY:
            first = next(replays.first for replays in self._replays if replays.step == entry.step)
        return _View(versions=entry.step, first=first)

    def reads(self, index: int, expected: Expected = lambda entry: ()) -> list[tuple[int, ...]]:
        """Every list of pages (entries, in their forms) that is read for one entry, in order.

        ``expected`` guesses what it brings back.
        """
        entry = self.entry(index)
        retrieved = expected(entry)
        plans = [self.write_plan(entry, retrieved)]
        if entry.kind is Kind.RENDER:
            plans.insert(0, self.read_plan(entry, retrieved))
        return list(dict.fromkeys(plan.pages for plan in plans))

    def coming(self, index: int, count: int, expected: Expected = lambda entry: ()) -> list[tuple[int, ...]]:
        """What the next ``count`` commits will read, from ``index`` on, as far as that is known; see :meth:`reads`."""
        last = min(index + count, self.num_entries)
        return [blocks for i in range(index, last) for blocks in self.reads(i, expected)]

    def needed_later(self, index: int) -> tuple[int, ...]:
        """Pages that entry ``index`` or any later one may read; all others can leave fast memory."""
        if not self.forms.plain:
            read = np.argwhere(self._usage.last_FE[:, :index] >= index).tolist()
            return tuple(page(form, entry) for form, entry in read)
        needed: set[int] = set()
        for last in self._until_second_render(index):
            needed.update(*self.reads(last))
        if self._history.policy is HistoryPolicy.RETRIEVE and index < self.num_entries:
            needed.update(self.candidates(self.entry(index)).entries)
        return tuple(sorted(other for other in needed if other < index))

    @property
    def max_attended(self) -> int:
        """The most entries that any commit attends at once, with all their tokens."""
        if not self.forms.plain:
            return self._usage.most_whole
        return history.max_attended(self._history, self._prefix + self._shot.num_blocks)

    @property
    def max_held(self) -> int:
        """The most entries that must be in reach while one is being committed, that one apart; of the first form."""
        return self.max_held_in(0)

    def max_held_in(self, form: int) -> int:
        """As :attr:`max_held`, of any form."""
        if not self.forms.plain:
            return self._usage.most_held[form]
        old_and_new = 2 * self._history.recent_blocks - 1 if self._rebuild else 0
        return min(max(self.max_attended, old_and_new), self.num_entries)

    def kept(self, form: int) -> Sequence[int]:
        """Entries that are encoded in a form, ascending: in the first all, in others those that will be read in it."""
        return range(self.num_entries) if form == 0 else np.flatnonzero(self._usage.last_FE[form] >= 0).tolist()

    def kept_pages(self, first: int, last: int) -> Iterator[int]:
        """The pages of entries ``first`` to ``last`` - 1, in all the forms that each is kept in."""
        yield from range(first, last)
        if not self.forms.plain:
            kept = np.argwhere(self._usage.last_FE[1:, first:last] >= 0).tolist()
            yield from (page(form + 1, first + entry) for form, entry in kept)

    @property
    def max_kept(self) -> int:
        """The most entries that must be kept somewhere while one is being committed, that one apart."""
        if self._history.policy is not HistoryPolicy.RETRIEVE:
            return self.max_held
        ends = [self.index_of(step) for step, _ in self._floors]  # of scenes, which only grow
        return max(len(self.needed_later(end - 1)) for end in (*ends, self.num_entries))

    @property
    def max_own_blocks(self) -> int:
        """The most blocks that are computed together."""
        return min(len(self._shot.sampler.timesteps), self._shot.num_blocks) if self._rolling else 1

    @cached_property
    def _usage(self) -> _Usage:
        """Who reads what, over the whole shot; plans themselves are not made for it."""
        last_FE = np.full((len(self.forms.specs), self.num_entries), LEFT_OUT)
        whole = np.array([not spec.merged for spec in self.forms.specs])
        most_whole = 0
        for index in range(self.num_entries):
            entry = self.entry(index)
            views = [self._write_view(entry)]
            if entry.kind is Kind.RENDER:
                views.append(self._read_view(entry))
            for view in dict.fromkeys(views):
                times = self._attended(entry, view)
                forms = self.forms.forms(entry.time, times)
                entries = np.asarray(self._entries(times, view.versions), dtype=np.int64)
                read = forms != LEFT_OUT
                last_FE[forms[read], entries[read]] = index
                most_whole = max(most_whole, int(whole[forms[read]].sum()))
        return _Usage(
            last_FE=last_FE, most_held=tuple(_most_at_once(last_E) for last_E in last_FE), most_whole=most_whole
        )

    def _until_second_render(self, index: int) -> Iterator[int]:
        renders = 0
        while index < self.num_entries and renders < 2:
            yield index
            renders += self.entry(index).kind is not Kind.REPLAY
            index += 1

    def _switches(self) -> Iterator[tuple[int, Switch]]:
        """Where prompts change: block of the shot, and how; a beat that no block is rendered under has no effect."""
        num_blocks = self._shot.num_blocks
        for beat, (config, step) in enumerate(zip(self._shot.beats, self._beat_steps, strict=True)):
            if beat > 0 and 0 < step < num_blocks and self._shot.beat_of_block(step) == beat:
                yield step, config.switch

    def _wanted_replays(self) -> Iterator[tuple[int, int, int]]:
        """(block of the shot, first block in time, number of blocks) of each replay."""
        recent = self._history.recent_blocks
        if self._rebuild:
            for step in range(self._shot.num_blocks if recent > 1 else 0):
                first = max(0, self._prefix + step - recent + 1)
                if count := self._prefix + step - first:
                    yield step, first, count
            return
        for step, switch in self._switches():
            if switch is Switch.RECACHE:
                sinks = 0 if self._history.policy is HistoryPolicy.FULL else self._history.sink_blocks
                first = max(sinks, self._floor(step), self._prefix + step - recent)
                if first < self._prefix + step:
                    yield step, first, self._prefix + step - first

    def _floor(self, step: int) -> int:
        """The first block in time, but for sinks, that blocks from ``step`` on attend."""
        floors = [self._prefix + at - (kind is Switch.FLUSH) for at, kind in self._floors if at <= step]
        return max(floors, default=0)

    def _cut(self, step: int) -> int | None:
        cuts = [self._prefix + at for at, kind in self._floors if at <= step and kind is Switch.CUT]
        return cuts[-1] if cuts else None

    def _make_plan(self, entry: Entry, view: _View, retrieved: tuple[int, ...]) -> Plan:
        """The last few are kept (``_made``), as each is asked for several times around its entry."""
        config, time = self._history, entry.time
        wanted = self._attended(entry, view)
        if retrieved:
            wanted = tuple(sorted({*wanted, *retrieved}))
        cut, own_blocks = self._cut(entry.step), view.own_blocks
        start, starts = history.place(config, time, wanted, self._frames, own_blocks=own_blocks, cut=cut)
        blocks = self._entries(wanted, view.versions)
        plan = Plan(block=entry.index, start=start, blocks=blocks, starts=starts, own_blocks=own_blocks)
        return plan if self.forms.plain else _with_forms(plan, self.forms.forms(time, wanted).tolist())

    def _attended(self, entry: Entry, view: _View) -> tuple[int, ...]:
        """Blocks in time that an entry attends, but for those brought back and those left out."""
        config, time = self._history, entry.time
        wanted = history.attended(config, time)
        if config.policy is not HistoryPolicy.FULL or self._floors:
            sinks, floor = config.sink_blocks, max(view.first, self._floor(entry.step))
            if view.own_blocks > 1:
                floor = max(floor, time - config.recent_blocks + view.own_blocks - 1)
            wanted = tuple(other for other in wanted if other < sinks or other >= floor)
        return wanted

    def _entries(self, times: tuple[int, ...], versions: int) -> tuple[int, ...]:
        """Blocks as entries: the newest of each once those of step ``versions`` are committed."""
        return tuple(self._newest(time, versions) for time in times) if self._replays else times

    def _newest(self, time: int, step: int) -> int:
        """The newest entry of a block once the replays of ``step`` are committed."""
        for replays in reversed(self._replays[: bisect_right(self._replay_steps, step)]):
            if self._prefix + replays.step <= time:
                break
            if replays.first <= time < replays.first + replays.count:
                return replays.index + time - replays.first
        return self.index_of(time - self._prefix)


def _with_forms(plan: Plan, forms: Sequence[int]) -> Plan:
    """A plan with its blocks' forms, without those that have none; what is left stays where it stood."""
    kept = [index for index, form in enumerate(forms) if form != LEFT_OUT]
    return replace(
        plan,
        blocks=tuple(plan.blocks[index] for index in kept),
        starts=tuple(plan.starts[index] for index in kept),
        forms=tuple(forms[index] for index in kept),
    )


def _most_at_once(last_E: Numbers) -> int:
    """The most entries that are committed and still to be read, while any one is being committed."""
    (entries,) = np.nonzero(last_E >= 0)
    changes = np.zeros(len(last_E) + 1, dtype=np.int64)
    np.add.at(changes, entries + 1, 1)
    np.add.at(changes, last_E[entries] + 1, -1)
    return int(changes.cumsum().max(initial=0))
