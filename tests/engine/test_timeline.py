"""Plans without tensors: positions, what is seen after a switch, what is committed anew, what may be forgotten."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.engine.config import (
    BeatConfig,
    HistoryConfig,
    HistoryPolicy,
    Loop,
    ModelConfig,
    ModelSpec,
    Positions,
    SamplerConfig,
    ShotConfig,
    Switch,
    WriteBack,
)
from longtake.engine.history import Plan, attended, place
from longtake.engine.timeline import Entry, Kind, Timeline
from longtake.kernels.errors import ConfigError

F = 3
WINDOW = HistoryConfig(sink_blocks=1, recent_blocks=3)
RETRIEVE = HistoryConfig(policy=HistoryPolicy.RETRIEVE, sink_blocks=1, recent_blocks=3, retrieved_blocks=2)


def make_shot(
    history: HistoryConfig = WINDOW,
    sampler: SamplerConfig | None = None,
    num_blocks: int = 12,
    switches: dict[int, Switch] | None = None,
) -> ShotConfig:
    sampler = sampler or SamplerConfig()
    spec = ModelSpec(
        path=Path("unused"),
        name="test",
        transformer=ModelConfig(num_heads=1, head_dim=16, num_layers=1, ffn_dim=8),
        sampler=sampler,
        block_frames=F,
        fps=16,
        height=32,
        width=32,
        text_len=4,
        history=history,
    )
    shot = ShotConfig(
        name="shot",
        model=spec,
        num_frames=1 + 4 * (F * num_blocks - 1),
        fps=16,
        height=32,
        width=32,
        seed=0,
        beats=(BeatConfig(at_s=0, prompt="a"),),
        sampler=sampler,
        history=history,
    )
    beats = [
        BeatConfig(at_s=shot.frames_of_latents(block * F) / 16, prompt=str(block), switch=switch)
        for block, switch in (switches or {}).items()
    ]
    return replace(shot, beats=(*shot.beats, *beats))


def entries(timeline: Timeline) -> list[Entry]:
    return [timeline.entry(index) for index in range(timeline.num_entries)]


def render_plan(timeline: Timeline, step: int) -> tuple[tuple[int, ...], float, tuple[float, ...]]:
    found = timeline.read_plan(timeline.entry(timeline.index_of(step)))
    return found.blocks, found.start, found.starts


def test_without_switches_entries_are_blocks() -> None:
    shot = make_shot()
    timeline = Timeline(shot, 2)
    assert timeline.num_entries == 14
    for index in range(14):
        entry = timeline.entry(index)
        assert (entry.time, entry.step) == (index, index - 2)
        blocks = attended(shot.history, index)
        start, starts = place(shot.history, index, blocks, F)
        assert timeline.write_plan(entry) == Plan(block=index, start=start, blocks=blocks, starts=starts)
    assert timeline.entry(1).kind is Kind.PREFIX
    assert timeline.entry(2).kind is Kind.RENDER


def test_the_example_on_top_of_the_module() -> None:
    shot = make_shot(HistoryConfig(sink_blocks=0, recent_blocks=2), num_blocks=4, switches={3: Switch.RECACHE})
    found = entries(Timeline(shot, 2))
    kinds = [entry.kind.value for entry in found]
    assert kinds == ["prefix", "prefix", "render", "render", "render", "replay", "replay", "render"]
    assert [entry.time for entry in found] == [0, 1, 2, 3, 4, 3, 4, 5]
    assert [entry.step for entry in found] == [-2, -1, 0, 1, 2, 3, 3, 3]


def test_recache_reads_what_was_committed_anew() -> None:
    timeline = Timeline(make_shot(switches={5: Switch.RECACHE}), 0)
    replays = [entry for entry in entries(timeline) if entry.kind is Kind.REPLAY]
    assert [(entry.index, entry.time) for entry in replays] == [(5, 2), (6, 3), (7, 4)]
    assert [timeline.write_plan(entry).blocks for entry in replays] == [(0,), (0, 5), (0, 5, 6)]
    assert render_plan(timeline, 4)[0] == (0, 1, 2, 3)
    assert render_plan(timeline, 5)[0] == (0, 5, 6, 7)
    assert render_plan(timeline, 6)[0] == (0, 6, 7, 8)
    assert render_plan(timeline, 9)[0] == (0, 9, 10, 11)


def test_flush_and_cut() -> None:
    flush = Timeline(make_shot(switches={5: Switch.FLUSH}), 0)
    assert [render_plan(flush, step)[0] for step in (4, 5, 6, 7, 8)] == [
        (0, 1, 2, 3),
        (0, 4),
        (0, 4, 5),
        (0, 4, 5, 6),
        (0, 5, 6, 7),
    ]
    cut = Timeline(make_shot(switches={5: Switch.CUT}), 0)
    assert render_plan(cut, 5) == ((0,), 18, (0,))
    assert render_plan(cut, 7) == ((0, 5, 6), 18, (0, 12, 15))
    assert render_plan(cut, 9) == ((0, 6, 7, 8), 18, (0, 9, 12, 15))
    absolute = Timeline(make_shot(replace(WINDOW, positions=Positions.ABSOLUTE), switches={5: Switch.CUT}), 0)
    assert render_plan(absolute, 6) == ((0, 5), 18 + 21, (0, 15 + 21))


def test_full_history_after_a_flush() -> None:
    full = HistoryConfig(policy=HistoryPolicy.FULL)
    assert render_plan(Timeline(make_shot(full, switches={5: Switch.FLUSH}), 0), 7)[0] == (0, 4, 5, 6)
    assert render_plan(Timeline(make_shot(full), 0), 7)[0] == tuple(range(7))


def test_rolling_windows_see_less_behind_them() -> None:
    sampler = SamplerConfig(timesteps=(1000, 800, 600, 400, 200), loop=Loop.ROLLING)
    timeline = Timeline(make_shot(HistoryConfig(sink_blocks=1, recent_blocks=5), sampler, num_blocks=20), 0)
    entry = timeline.entry(10)
    read = timeline.read_plan(entry)
    assert (read.own_blocks, read.blocks, read.starts, read.start) == (5, (0, 9), (0, 3), 6)
    assert timeline.write_plan(entry).blocks == (0, 5, 6, 7, 8, 9)
    assert timeline.read_plan(timeline.entry(18)).own_blocks == 2
    assert timeline.read_plan(timeline.entry(18)).blocks == (0, 14, 15, 16, 17)
    assert timeline.max_own_blocks == 5


@pytest.mark.parametrize(
    ("history", "sampler", "switches"),
    [
        (WINDOW, SamplerConfig(write_back=WriteBack.REBUILD), {}),
        (HistoryConfig(policy=HistoryPolicy.FULL), SamplerConfig(write_back=WriteBack.REBUILD), {}),
        (WINDOW, SamplerConfig(loop=Loop.ROLLING), {4: Switch.RECACHE}),
        (HistoryConfig(policy=HistoryPolicy.FULL), SamplerConfig(loop=Loop.ROLLING), {}),
        (RETRIEVE, SamplerConfig(loop=Loop.ROLLING), {}),
        (RETRIEVE, SamplerConfig(write_back=WriteBack.REBUILD), {}),
        (replace(RETRIEVE, positions=Positions.ABSOLUTE), SamplerConfig(), {}),
        (replace(RETRIEVE, retrieved_blocks=0), SamplerConfig(), {}),
        (replace(WINDOW, retrieved_blocks=2), SamplerConfig(), {}),
        (
            HistoryConfig(sink_blocks=0),
            SamplerConfig(loop=Loop.ROLLING, write_back=WriteBack.REBUILD),
            {},
        ),
    ],
)
def test_what_excludes_each_other_is_refused(
    history: HistoryConfig, sampler: SamplerConfig, switches: dict[int, Switch]
) -> None:
    with pytest.raises(ConfigError, match="shot 'shot': "):
        Timeline(make_shot(history, sampler, switches=switches), 0)


def test_positions_by_policy() -> None:
    def at(policy: Positions, time: int, times: list[int]) -> tuple[float, tuple[float, ...]]:
        return place(HistoryConfig(positions=policy), time, times, F)

    assert at(Positions.ABSOLUTE, 100, [0, 98, 99]) == (300, (0, 294, 297))
    assert at(Positions.RELATIVE, 100, [0, 98, 99]) == (9, (0, 3, 6))
    assert at(Positions.SINK, 100, [0, 98, 99]) == (300, (291, 294, 297))
    # a sink, a retrieved block, two recent ones: all in 0..20, the near ones at their distance
    assert at(Positions.BOUNDED, 100, [0, 40, 98, 99]) == (18, (0, 3, 12, 15))
    assert at(Positions.BOUNDED, 3, [0, 1, 2]) == (9, (0, 3, 6))
    assert at(Positions.BOUNDED, 50, list(range(42, 50)))[0] == 24  # more than the trained range holds


histories = st.builds(
    HistoryConfig,
    policy=st.sampled_from(HistoryPolicy),
    sink_blocks=st.integers(0, 3),
    recent_blocks=st.integers(1, 5),
    positions=st.sampled_from(Positions),
)
switched = st.dictionaries(st.integers(1, 14), st.sampled_from(Switch), max_size=4).map(
    lambda d: dict(sorted(d.items()))
)


@settings(deadline=None, max_examples=80)
@given(histories, switched, st.integers(0, 4), st.sampled_from(["clean", "rolling", "rebuild"]), st.randoms())
def test_every_plan_can_be_read(
    history: HistoryConfig, switches: dict[int, Switch], num_prefix: int, loop: str, random: Random
) -> None:
    """Only committed entries are read, in order of time, apart; none after it was let go; memory is bounded."""
    sampler = SamplerConfig()
    if loop != "clean":
        history = replace(history, policy=HistoryPolicy.WINDOW, sink_blocks=0 if loop == "rebuild" else 1)
        switches = {step: switch for step, switch in switches.items() if switch is not Switch.RECACHE}
        sampler = SamplerConfig(loop=Loop.ROLLING) if loop == "rolling" else SamplerConfig(write_back=WriteBack.REBUILD)
    if retrieve := history.policy is HistoryPolicy.RETRIEVE:
        positions = Positions.BOUNDED if history.positions is Positions.ABSOLUTE else history.positions
        history = replace(history, retrieved_blocks=2, positions=positions)
    shot = make_shot(history, sampler, num_blocks=16, switches=switches)
    timeline = Timeline(shot, num_prefix)
    found = entries(timeline)
    assert [entry.step for entry in found if entry.kind is Kind.RENDER] == list(range(16))
    assert [entry.time for entry in found if entry.kind is Kind.PREFIX] == list(range(num_prefix))
    held: set[int] = set()
    for entry in found:
        may = timeline.retrievable(entry)
        retrieved = tuple(sorted(random.sample(may, min(2, len(may)))))
        plans = [timeline.write_plan(entry, retrieved)]
        if entry.kind is Kind.RENDER:
            assert timeline.index_of(entry.step) == entry.index
            plans.append(timeline.read_plan(entry, retrieved))
        assert not may or set(timeline.candidates(entry).entries) <= held
        for found_plan in plans:
            assert set(found_plan.blocks) <= held
            assert len(found_plan.blocks) <= timeline.max_attended
            times = [timeline.entry(block).time for block in found_plan.blocks]
            assert times == sorted(set(times)) and all(time < entry.time for time in times)
            ends = [*found_plan.starts, found_plan.start]
            assert all(b - a >= F for a, b in pairwise(ends)) and ends[0] >= 0
        held.add(entry.index)
        held &= {*timeline.needed_later(entry.index + 1)}
        assert len(held) <= 1 + (timeline.max_kept if retrieve else timeline.max_held)
    for blocks in range(17):
        known = timeline.num_known(blocks)
        assert all(e.step < blocks or e.kind is Kind.REPLAY for e in found[:known])


def test_what_may_come_back() -> None:
    """Between sinks and window, of the scene; a block committed anew sees none, later ones its newest version."""
    timeline = Timeline(make_shot(RETRIEVE, switches={5: Switch.RECACHE, 8: Switch.CUT}), 0)
    found = entries(timeline)
    may = {entry.index: timeline.retrievable(entry) for entry in found}
    assert [entry.kind for entry in found[5:8]] == [Kind.REPLAY] * 3
    assert [list(may[index]) for index in (3, 4, 5, 7, 8, 10, 11, 14)] == [[], [], [], [], [1], [1, 2, 3], [], []]
    assert list(timeline.candidates(found[10]).entries) == [0, 1, 5, 6, 7, 8, 9]
    assert timeline.read_plan(found[10], (2,)).blocks == (0, 5, 7, 8, 9)
    assert timeline.needed_later(10) == (0, 1, 5, 6, 7, 8, 9)
    assert timeline.candidates(found[14]).first == 8
    assert timeline.max_kept == len({0, 1, 5, 6, 7, 8, 9}) and timeline.num_entries == 15  # of the longer scene
