"""Prompts say what scenes are, scripts tell the truth about their world, and staging does what they say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.engine.mini import palette, shapes
from longtake.engine.mini.prompts import (
    BEAT_GRID_S,
    MAX_PROMPT_BYTES,
    MIN_BEAT_S,
    Actor,
    Beat,
    Scene,
    Script,
    camera_path,
    describe,
    parse,
    random_scripts,
    stage,
    tokens,
)
from longtake.engine.mini.render import render
from longtake.engine.mini.world import FPS, NEVER_S, NUM_ACTORS, RING_PX, WIDTH, build_worlds, sky_weights
from longtake.kernels.errors import ConfigError

SIDES = (None, "left", "right")
ACTORS = st.builds(
    Actor, st.sampled_from(list(shapes.ACTORS)), st.sampled_from(palette.COLOURS), st.sampled_from(SIDES)
)
SCENES = st.builds(
    Scene,
    st.sampled_from(palette.TIMES),
    st.sampled_from(palette.WEATHERS),
    st.integers(-4, 4),
    st.lists(ACTORS, max_size=2).map(tuple),
    st.sampled_from([None, *shapes.LANDMARKS]),
)


@settings(max_examples=1500, deadline=None)
@given(SCENES, st.none() | SCENES, st.integers(0, 2**32), st.booleans())
def test_parse_is_the_inverse_of_describe(scene: Scene, previous: Scene | None, seed: int, loud: bool) -> None:
    prompt = describe(scene, previous, np.random.default_rng(seed))
    assert 0 < len(prompt.encode()) <= MAX_PROMPT_BYTES
    assert parse(prompt, previous) == scene
    shouted = prompt.upper().replace(". ", " ; ").replace(", ", " - , ") + " !"
    assert parse(shouted if loud else f"well, {prompt}", previous) == scene


def test_prompts_as_people_write_them() -> None:
    day = Scene("day", "clear", 0, (), None)
    assert parse("Pan right slowly past the lighthouse.") == Scene("day", "clear", 2, (), "lighthouse")
    boat = Actor("boat", "red", "left")
    assert parse("dusk, light rain. hold still. a red boat enters from the left") == Scene(
        "dusk", "rain", 0, (boat,), None
    )
    panning = Scene("dusk", "rain", -3, (boat,), "castle")
    assert parse("a Red Boat slowly enters from the LEFT!", panning) == Scene("dusk", "rain", -3, (boat,), None)
    assert parse("the rain stops", panning) == Scene("dusk", "clear", -3, (), None)
    assert parse("keep going, very slowly pan to the left as night falls", panning) == Scene(
        "night", "rain", -1, (), None
    )
    bird = Actor("bird", "white", None)
    assert parse("quickly pan right with a white bird") == Scene("day", "clear", 4, (bird,), None)
    assert parse("") == parse("colourless green ideas sleep furiously") == day


def test_what_cannot_be_said_is_refused() -> None:
    rng = np.random.default_rng(0)
    crowd = tuple(Actor("balloon", "yellow", "right") for _ in range(5))
    with pytest.raises(ConfigError, match="fewer actors"):
        describe(Scene("night", "snow", -1, crowd, "water tower"), None, rng)
    with pytest.raises(ConfigError, match="cannot show"):
        describe(Scene("night", "hail", -1, (), None), None, rng)


def _angles(count: int) -> np.ndarray:
    return np.arange(count) * 37.0


def test_scripts_are_a_function_of_their_seed() -> None:
    worlds, angles = build_worlds(range(40)), _angles(40)
    scripts = random_scripts(worlds, angles, 12.0, list(range(100, 140)))
    assert scripts == random_scripts(worlds, angles, 12.0, list(range(100, 140)))
    few = torch.tensor([7, 3])
    assert random_scripts(worlds.take(few), angles[[7, 3]], 12.0, [107, 103]) == [scripts[7], scripts[3]]
    assert scripts != random_scripts(worlds, angles, 12.0, list(range(200, 240)))


@pytest.mark.parametrize("duration_s", [2.0, 6.0, 9.0, 12.0, 30.0])
def test_scripts_are_well_formed_and_true(duration_s: float) -> None:
    count = 300
    worlds = build_worlds(range(count))
    scripts = random_scripts(worlds, _angles(count), duration_s, list(range(count)))
    names = list(shapes.LANDMARKS)
    hints = 0
    for world, script in enumerate(scripts):
        starts = [beat.at_s for beat in script]
        assert starts[0] == 0 and len(script) <= 3
        assert all((at / BEAT_GRID_S).is_integer() for at in starts)
        assert all(np.diff([*starts, duration_s]) >= MIN_BEAT_S - 1e-9) or len(script) == 1
        assert sum(len(beat.scene.actors) for beat in script) <= NUM_ACTORS
        previous = None
        frames = round(duration_s * FPS)
        path = camera_path(script, frames + 1, _angles(count)[world])
        for beat, end in zip(script, [*starts[1:], duration_s], strict=True):
            assert parse(beat.prompt, previous) == beat.scene
            previous = beat.scene
            if beat.scene.landmark is None:
                continue
            hints += 1
            kind = worlds.landmark_kind_WL[world].numpy() == names.index(beat.scene.landmark)
            x = worlds.landmark_x_WL[world].numpy()[kind]
            part = path[round(beat.at_s * FPS) : round(end * FPS) + 1]
            seen = (x[:, None] - part) % RING_PX < WIDTH
            came = seen.any(1) & (~seen[:, 0] if beat.scene.pan_px else seen.all(1))
            assert came.any()
    assert hints > count * 0.1


def test_scripts_cover_what_is_to_be_learned() -> None:
    count = 2000
    scripts = random_scripts(
        build_worlds([1]).take(torch.zeros(count, dtype=torch.int64)), _angles(count), 12.0, range(count)
    )
    first = [script[0].scene for script in scripts]
    speed = np.bincount([abs(scene.pan_px) for scene in first], minlength=5) / count
    assert speed[2:].min() > 0.2 and speed[:2].max() < 0.15 and speed[:2].min() > 0.05
    assert np.mean([scene.weather == "clear" for scene in first]) == pytest.approx(0.75, abs=0.04)
    assert np.mean([len(script) == 1 for script in scripts]) == pytest.approx(0.45, abs=0.04)
    later = [(a.scene, b.scene) for script in scripts for a, b in itertools.pairwise(script)]
    changed = [(a.time, a.weather, a.pan_px) != (b.time, b.weather, b.pan_px) or b.actors for a, b in later]
    assert all(changed)
    assert all(actor.side for _, b in later for actor in b.actors)


def test_the_camera_path_is_the_sum_of_the_pans() -> None:
    def beat(at_s: float, pan_px: int) -> Beat:
        return Beat(at_s, Scene("day", "clear", pan_px, (), None), "")

    script: Script = (beat(0, 3), beat(0.75, 0), beat(1.0, -4))
    path = camera_path(script, 20, 100.0)
    assert path.dtype == np.float64
    assert path.tolist() == [*(100.0 + 3 * t for t in range(13)), 136, 136, 136, 136, 132, 128, 124]
    assert camera_path((beat(0, 1), beat(0.07, 2)), 4, 0.0).tolist() == [0, 1, 2, 4]
    assert len(camera_path(script, 5, 0.0)) == 5


def _columns_of_actors(scripts: list[Script], time_s: float, seeds: list[int], angle: float) -> torch.Tensor:
    """Where the actors are: how much each column of the picture differs from one without them; [W, X]."""
    worlds = build_worlds(seeds)
    angles = np.full(len(seeds), angle)
    empty = [
        tuple(Beat(b.at_s, Scene(b.scene.time, b.scene.weather, b.scene.pan_px, (), None), "") for b in s)
        for s in scripts
    ]
    frame = round(time_s * FPS)
    path = torch.tensor(np.stack([camera_path(script, frame + 1, angle)[frame:] for script in scripts]))
    time = torch.full_like(path, time_s)
    difference = render(stage(worlds, scripts, angles), path, time) - render(stage(worlds, empty, angles), path, time)
    return difference.abs().sum((1, 2, 3))


@pytest.mark.parametrize("pan_px", [-4, -1, 0, 3])
@pytest.mark.parametrize("at_s", [0.0, 3.0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_actor_enters_from_its_side_and_crosses(pan_px: int, at_s: float, side: str) -> None:
    seeds = [1, 2, 3, 4]
    scripts: list[Script] = []
    for kind in shapes.ACTORS:
        beat = Beat(at_s, Scene("day", "clear", pan_px, (Actor(kind, "red", side),), None), "")
        start = Beat(0.0, Scene("day", "clear", 2, (), None), "")
        scripts.append((beat,) if at_s == 0 else (start, beat))
    columns = torch.arange(WIDTH) + 0.5
    if side == "right":
        columns = columns.flip(0)
    if at_s:
        assert float(_columns_of_actors(scripts, at_s - 0.5, seeds, 70.0).max()) == 0
    places = []
    for after in (1.5, 4.5):
        row = _columns_of_actors(scripts, at_s + after, seeds, 70.0)
        assert float(row.sum(1).min()) > 0
        places.append((columns * row).sum(1) / row.sum(1))
    assert float(places[0].max()) < WIDTH / 3
    assert float((places[1] - places[0]).min()) > 3 * 8 * 0.6


def test_an_actor_without_a_side_stands_in_the_picture() -> None:
    pair = (Actor("boat", "blue", None), Actor("balloon", "white", None))
    scripts: list[Script] = [(Beat(0.0, Scene("day", "clear", 2, pair, None), ""),)] * 30
    staged = stage(build_worlds(range(30)), scripts, np.full(30, 500.0))
    screen = (staged.actor_x_WA[:, :2] - 500.0) % RING_PX
    assert float(screen.min()) >= 20 and float(screen.max()) <= WIDTH - 20
    assert float(staged.actor_speed_WA.abs().max()) == 0
    assert (staged.actor_kind_WA >= 0).sum(1).tolist() == [2] * 30


def test_light_and_weather_follow_the_beats() -> None:
    def beat(at_s: float, time: str, weather: str) -> Beat:
        return Beat(at_s, Scene(time, weather, 0, (), None), "")

    script = (beat(0, "dusk", "clear"), beat(3, "dusk", "clear"), beat(6, "night", "snow"))
    staged = stage(build_worlds([5]), [script], np.zeros(1))
    assert staged.event_s_WE[0, :3].tolist() == [0, 6, np.float32(NEVER_S)]
    times, weathers = sky_weights(staged, torch.tensor([[0.0, 5.9, 7.1]]))
    assert times[0].argmax(-1).tolist() == [palette.TIMES.index(name) for name in ("dusk", "dusk", "night")]
    assert weathers[0].argmax(-1).tolist() == [0, 0, palette.WEATHERS.index("snow")]


def test_stage_refuses_more_than_a_world_holds() -> None:
    crowd = (Actor("bird", "white", "left"),) * (NUM_ACTORS + 1)
    with pytest.raises(ConfigError, match="actors"):
        stage(build_worlds([5]), [(Beat(0.0, Scene("day", "clear", 0, crowd, None), ""),)], np.zeros(1))
    scenes = [Scene(time, "clear", 0, (), None) for time in ("day", "night") * 5]
    beats = tuple(Beat(3.0 * index, scene, "") for index, scene in enumerate(scenes))
    with pytest.raises(ConfigError, match="fewer beats"):
        stage(build_worlds([5]), [beats], np.zeros(1))


def test_tokens_are_those_of_byt5() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.ByT5Tokenizer()
    for prompt in ("pan right slowly past the lighthouse", "", "Größe 12", "x" * 127, "x" * 200):
        wanted = tokenizer(prompt, padding="max_length", max_length=128, truncation=True)["input_ids"]
        got = tokens(prompt)
        assert got.dtype == np.uint16
        assert got.tolist() == wanted
