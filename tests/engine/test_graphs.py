"""Recorded passes: the same film as kernel by kernel, recorded when it pays, never when blocks differ in more."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longtake.engine.attention import HistoryAttention
from longtake.engine.config import BeatConfig, HistoryConfig, HistoryPolicy, Positions, ShotConfig
from longtake.engine.graphs import PassGraphs, Recorder, Recording
from longtake.engine.history import Plan
from longtake.engine.model import CausalWan, TextContext
from longtake.engine.rollout import Rollout
from longtake.engine.shotcache import open_cache, shot_forms
from longtake.kernels.attention_path import make_path
from tests.engine import small_rollout
from tests.engine.small_rollout import GEOMETRY, ONE_BEAT, random_contexts, random_model
from tests.engine.test_forms import CASES, shot_with

CPU = torch.device("cpu")
WINDOW = HistoryConfig(sink_blocks=1, recent_blocks=2)
TWO_BEATS = (*ONE_BEAT, BeatConfig(at_s=3.5, prompt="b"))  # from the eighth block on


class Played:
    """What a recording is to its user: the function again, reading what it read, into the same tensor."""

    num_bytes = 1000

    def __init__(self, run: Callable[[], Tensor], beside: Recording | None) -> None:
        self.beside = beside
        self.num_replays = 0
        self._run = run
        self._out: Tensor | None = None

    def replay(self) -> Tensor:
        self.num_replays += 1
        out = self._run()
        if self._out is None:
            self._out = torch.empty_like(out)
        return self._out.copy_(out)


class Recorded(list[Played]):
    """A recorder that remembers."""

    def __call__(self, run: Callable[[], Tensor], beside: Recording | None) -> Recording:
        self.append(Played(run, beside))
        return self[-1]


def make_shot(history: HistoryConfig = WINDOW, codec: str = "int4", num_blocks: int = 12) -> ShotConfig:
    return small_rollout.make_shot(history, codec, num_blocks, beats=TWO_BEATS, size=(32, 96))


def make_rollout(
    shot: ShotConfig, model: CausalWan, contexts: list[TextContext], recorder: Recorder | None = None
) -> Rollout:
    run = Rollout(shot, model, contexts[: len(shot.beats)], open_cache(shot, CPU))
    run.passes = PassGraphs(model, recorder)
    return run


def film(run: Rollout) -> Tensor:
    return torch.stack([run.step() for _ in range(run.total_blocks)])


WINDOWS = {
    "int4": make_shot(),
    "bf16, fp8": replace(make_shot(codec="bf16"), attention="fp8"),
    "absolute": make_shot(replace(WINDOW, positions=Positions.ABSOLUTE)),
    "jitter": make_shot(replace(WINDOW, head_jitter=0.3)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_the_same_film_from_few_recordings(name: str, model: CausalWan, contexts: list[TextContext]) -> None:
    recorder = Recorded()
    run = make_rollout(WINDOWS[name], model, contexts, recorder)
    assert torch.equal(film(run), film(make_rollout(WINDOWS[name], model, contexts)))
    # blocks 3 and 7 are the first with a full window and with the second prompt; 4 to 6 and 8 to 11 are replayed
    assert [recording.num_replays for recording in recorder] == [2 * 3, 3, 2 * 4, 4]
    assert [recording.beside for recording in recorder] == [None, recorder[0], recorder[1], recorder[2]]


def test_merged_and_younger_forms_are_recorded(model: CausalWan, contexts: list[TextContext]) -> None:
    shot = shot_with(*CASES["window"], num_blocks=16)
    recorder = Recorded()
    run = make_rollout(shot, model, contexts, recorder)
    assert torch.equal(film(run), film(make_rollout(shot, model, contexts)))
    assert sum(recording.num_replays for recording in recorder) > 0


def test_what_is_kept_of_the_keys_is_not_recorded(model: CausalWan, contexts: list[TextContext]) -> None:
    shot = make_shot(HistoryConfig(policy=HistoryPolicy.RETRIEVE, sink_blocks=1, recent_blocks=2, retrieved_blocks=1))
    recorder = Recorded()
    run = make_rollout(shot, model, contexts, recorder)
    assert torch.equal(film(run), film(make_rollout(shot, model, contexts)))
    assert recorder and all(recording.num_replays % 2 == 0 for recording in recorder)  # both steps, never the commit


@pytest.mark.parametrize(
    "shot",
    [make_shot(HistoryConfig(policy=HistoryPolicy.FULL, positions=Positions.ABSOLUTE)), make_shot(codec="qvg")],
    ids=["a growing history", "a codec whose work depends on the block"],
)
def test_blocks_that_differ_are_not_recorded(shot: ShotConfig, model: CausalWan, contexts: list[TextContext]) -> None:
    recorder = Recorded()
    film(make_rollout(replace(shot, beats=ONE_BEAT), model, contexts, recorder))
    assert not recorder


def test_streamed_pages_are_not_recorded() -> None:
    shot = make_shot()
    forms = shot_forms(shot)

    class Streamed:
        parts: Iterable[Streamed]
        streamed = True

        def pages(self, layer: int) -> tuple[Tensor, Tensor]:
            raise AssertionError("a streamed page was asked for before its turn")

    reading = Streamed()
    reading.parts = (reading,)
    path = make_path("dense", forms[0].codec, 2, 2 * shot.tokens_per_block, torch.float32, CPU)
    plan = Plan(block=1, start=2.0, blocks=(0,), starts=(0.0,))
    assert HistoryAttention(plan, reading, forms, 2, path, CPU).shape is None  # type: ignore[arg-type]
    reading.streamed = False
    with pytest.raises(AssertionError, match="before its turn"):
        HistoryAttention(plan, reading, forms, 2, path, CPU).shape  # type: ignore[arg-type]  # noqa: B018


def test_no_room_to_record_leaves_the_rollout_as_it_was(
    model: CausalWan, contexts: list[TextContext], caplog: pytest.LogCaptureFixture
) -> None:
    def full(run: Callable[[], Tensor], beside: Recording | None) -> Recording:
        raise torch.OutOfMemoryError("no room")

    shot = make_shot()
    with caplog.at_level(logging.WARNING):
        found = film(make_rollout(shot, model, contexts, full))
    assert torch.equal(found, film(make_rollout(shot, model, contexts)))
    assert [record.message for record in caplog.records if "no room" in record.message]
    assert len(caplog.records) == 1


def test_others_rest_before_a_recording_and_only_then(model: CausalWan, contexts: list[TextContext]) -> None:
    recorder = Recorded()
    run = make_rollout(make_shot(), model, contexts, recorder)
    rested: list[tuple[int, int]] = []
    told: list[int] = []

    def rest(due: bool) -> None:
        told.append(run.next_block)
        if due:
            rested.append((run.next_block, len(recorder)))

    run.rest = rest
    film(run)
    # blocks 4 and 8 are the first that look like the one before; both of their recordings come after the rest
    assert rested == [(4, 0), (8, 2)] and len(recorder) == 4
    assert told == sorted(told) and set(told) == set(range(make_shot().num_blocks)), "the same on each rank of a gang"


def test_every_byte_is_counted_and_let_go(model: CausalWan, contexts: list[TextContext]) -> None:
    shot = make_shot()
    run = make_rollout(shot, model, contexts, Recorded())
    assert run.memory()["recorded_passes"] == 0
    film(run)
    block_bytes = run.codec.payload_bytes * GEOMETRY.num_heads * GEOMETRY.num_layers
    assert run.memory()["recorded_passes"] == Played.num_bytes + block_bytes
    run.close()
    assert run.memory()["recorded_passes"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["int4", "tc2"])
@pytest.mark.parametrize("attention", ["dense", "fp8"])
def test_cuda_graphs_make_the_same_film(codec: str, attention: str) -> None:
    config = replace(GEOMETRY, head_dim=64)
    model = random_model(config, "cuda")
    model.compile_layers()
    shot = make_shot(codec=codec)
    shot = replace(shot, attention=attention, model=replace(shot.model, transformer=config))
    contexts = random_contexts(model, 2)
    films = []
    for graphs in (False, True):
        run = Rollout(shot, model, contexts, open_cache(shot, torch.device("cuda")), graphs=graphs)
        films.append(film(run).cpu())
        assert (run.memory()["recorded_passes"] > 0) == graphs
        run.close()
    assert films[0].isfinite().all() and torch.equal(*films)
