"""The world is a pure function of seed, angle and time, and its rings close."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longtake.engine.mini import palette, shapes
from longtake.engine.mini.panorama import paint
from longtake.engine.mini.render import render
from longtake.engine.mini.world import (
    HEIGHT,
    NEVER_S,
    NUM_ACTORS,
    NUM_EVENTS,
    RING_PX,
    WIDTH,
    WorldSpec,
    build_worlds,
    sky_weights,
)


def _stage(seeds: list[int], time: str = "day", weather: str = "clear", kind: str | None = None) -> WorldSpec:
    """Worlds with one light and weather and at most one actor, moving right 16 px a second from ring position 20."""
    shape = (len(seeds), NUM_ACTORS)
    kinds = np.full(shape, -1)
    if kind:
        kinds[:, 0] = list(shapes.ACTORS).index(kind)
    moments = np.full((len(seeds), NUM_EVENTS), NEVER_S)
    moments[:, 0] = 0
    same = np.ones((len(seeds), NUM_EVENTS), dtype=int)
    worlds = build_worlds(seeds).set_events(
        moments, same * palette.TIMES.index(time), same * palette.WEATHERS.index(weather)
    )
    return worlds.set_actors(
        kinds, np.zeros(shape, dtype=int), np.full(shape, 1.0), np.full(shape, 20.0), np.full(shape, 16.0)
    )


def _frames(worlds: WorldSpec, angles: list[float], times: list[float]) -> torch.Tensor:
    count = len(worlds.seeds_W)
    angle, time = torch.tensor(angles, dtype=torch.float64), torch.tensor(times, dtype=torch.float64)
    return render(worlds, angle.expand(count, -1), time.expand(count, -1))


def test_a_seed_is_the_same_world_in_any_batch() -> None:
    together = _frames(build_worlds([5, 6, 7]), [31.0, 40.5], [0.5, 2.0])
    alone = _frames(build_worlds([6]), [31.0, 40.5], [0.5, 2.0])
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    assert together.shape == (3, 2, 3, HEIGHT, WIDTH)
    assert float(together.min()) >= 0 and float(together.max()) <= 1


def test_a_column_in_the_middle_of_a_landmark_is_painted() -> None:
    near = paint(build_worlds([5003272])).near_WNCY  # one of its landmarks stands at a column's middle exactly
    assert near.isfinite().all()


@pytest.mark.parametrize("angle", [0.0, 17.0, 100.5, 333.3, -41.0])
def test_what_stands_still_is_back_after_one_turn(angle: float) -> None:
    worlds = _stage([1, 2], "dusk")
    turns = [angle, angle + RING_PX, angle - 3 * RING_PX, angle + 100 * RING_PX]
    first, *later = _frames(worlds, turns, [1.0] * 4).unbind(1)
    for frame in later:
        assert torch.equal(first, frame)


def test_the_near_ring_moves_with_the_camera() -> None:
    worlds = _stage([3])
    a, b = _frames(worlds, [10.0, 14.0], [0.0, 0.0])[0]
    # The road is on the near ring alone, so four pixels of camera are four pixels of road.
    assert torch.allclose(a[:, 71:73, 4:], b[:, 71:73, :-4], atol=1e-5)


@pytest.mark.parametrize("kind", list(shapes.ACTORS))
def test_an_actor_enters_at_its_time_and_moves_at_its_speed(kind: str) -> None:
    empty, worlds = _stage([4]), _stage([4], kind=kind)
    times = [0.9, 1.0, 3.0, 5.0]
    difference = (_frames(worlds, [0.0] * 4, times) - _frames(empty, [0.0] * 4, times))[0].abs().sum((1, 2))
    assert float(difference[0].max()) == 0
    columns = torch.arange(WIDTH) + 0.5
    for time, row in zip(times[1:], difference[1:], strict=True):
        middle = float((columns * row).sum() / row.sum())
        assert middle == pytest.approx(20 + 16 * (time - 1), abs=5.0)


def test_light_and_weather_fade_over_a_second() -> None:
    moments = np.full((1, NUM_EVENTS), NEVER_S)
    moments[:, :2] = [0, 4]
    times, weathers = np.zeros((1, NUM_EVENTS), dtype=int), np.zeros((1, NUM_EVENTS), dtype=int)
    times[:, 1:], weathers[:, 1:] = 3, 2
    worlds = build_worlds([1]).set_events(moments, times, weathers)
    light, weather = sky_weights(worlds, torch.tensor([[3.9, 4.25, 5.0, 9.0]]))
    assert light[0, :, 3].tolist() == pytest.approx([0, 0.25, 1, 1], abs=1e-5)
    assert weather[0, :, 2].tolist() == pytest.approx([0, 0.25, 1, 1], abs=1e-5)
    assert torch.allclose(light.sum(-1), torch.ones(1, 4))


def test_painted_textures_can_be_shared() -> None:
    worlds = build_worlds([8, 9])
    index = torch.tensor([1, 0, 1])
    angle, time = torch.tensor([[3.0], [9.0], [20.0]]), torch.full((3, 1), 2.0)
    shared = render(worlds.take(index), angle, time, painted=paint(worlds), painted_row_W=index)
    assert torch.equal(shared, render(worlds.take(index), angle, time, frames_at_once=2))


def test_every_ring_shows_every_landmark_of_which_there_is_room() -> None:
    kinds = build_worlds(list(range(50))).landmark_kind_WL
    present = (kinds >= 0).sum(1)
    assert int(present.min()) >= 10
    for row, count in zip(kinds.tolist(), present.tolist(), strict=True):
        assert len({k for k in row if k >= 0}) >= min(count, len(shapes.LANDMARKS)) - 2
