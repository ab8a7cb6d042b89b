from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.engine.config import (
    BeatConfig,
    CacheConfig,
    HistoryPolicy,
    ModelSpec,
    Positions,
    PruneConfig,
    ShotConfig,
    Switch,
    TierConfig,
    WriteBack,
)
from longtake.jobs.film import parse_film
from longtake.jobs.resolve import _on_frame, resolve
from longtake.kernels.errors import ConfigError

SHOT = '[[shot]]\nname = "a"\nduration = "5s"\nprompt = "p"\n'
NEXT = '[[shot]]\nname = "b"\nduration = "3s"\nprompt = "q"\nafter = "a"\n'


def resolved(text: str, spec: ModelSpec) -> dict[str, ShotConfig]:
    return resolve(parse_film(text), lambda name: spec)


def test_the_models_defaults_fill_in(spec: ModelSpec) -> None:
    config = resolved(SHOT, spec)["a"]
    assert (config.num_frames, config.fps, config.height, config.width, config.seed) == (80, 16, 96, 160, 0)
    assert (config.history, config.sampler, config.after, config.after_blocks) == (spec.history, spec.sampler, None, 0)
    assert config.beats == (BeatConfig(at_s=0.0, prompt="p"),)


def test_the_film_overrides_the_model(spec: ModelSpec) -> None:
    text = SHOT + (
        'size = [112, 128]\nfps = 24\nseed = 9\nsteps = 2\ncodec = "bf16"\nhistory.policy = "window"\n'
        'history.sink_blocks = 0\nhistory.recent_blocks = 2\nhistory.positions = "absolute"\ncache.device = "1GiB"\n'
        '[[shot.beat]]\nat = "2.5s"\nprompt = "r"\n'
    )
    config = resolved(text, spec)["a"]
    assert (config.num_frames, config.fps, config.height, config.width, config.seed) == (120, 24, 112, 128, 9)
    assert (config.history.sink_blocks, config.history.recent_blocks) == (0, 2)
    assert config.history.positions is Positions.ABSOLUTE
    assert config.sampler == dataclasses.replace(spec.sampler, timesteps=(1000.0, 500.0))
    assert (config.cache.codec, config.cache.device_bytes) == ("bf16", 1 << 30)
    assert config.beats[1] == BeatConfig(at_s=2.5, prompt="r")


def test_full_history(spec: ModelSpec) -> None:
    config = resolved(SHOT + 'history.policy = "full"\n', spec)["a"]
    assert config.history.policy is HistoryPolicy.FULL


@pytest.mark.parametrize(
    ("duration", "num_frames"), [("5s", 80), ("0.1s", 2), ("62500ms", 1000), ("1m", 960), ("1ms", 1)]
)
def test_durations_round_up_to_frames(spec: ModelSpec, duration: str, num_frames: int) -> None:
    config = resolved(SHOT.replace("5s", duration), spec)["a"]
    assert config.num_frames == num_frames
    assert type(config.num_frames) is int


def test_a_shot_that_another_continues_ends_with_a_block(spec: ModelSpec) -> None:
    configs = resolved(SHOT + NEXT, spec)
    assert configs["a"].num_frames == 81  # 7 blocks of 3 latent frames: 1 + 20 * 4
    assert configs["a"].num_blocks == 7
    assert (configs["b"].num_frames, configs["b"].num_blocks) == (48, 4)  # 12 latent frames of 4
    assert resolved(SHOT.replace("5s", "5.1s") + NEXT, spec)["a"].num_frames == 93


@given(st.fractions(Fraction(1, 1000), 10_000, max_denominator=1000), st.integers(1, 240))
def test_a_beat_begins_with_the_first_frame_at_or_after_its_time(at_s: Fraction, fps: int) -> None:
    seconds = _on_frame(at_s, fps)
    frame = math.ceil(at_s * fps)
    assert frame - 1 < seconds * fps <= frame


def test_after_blocks(spec: ModelSpec) -> None:
    assert resolved(SHOT + NEXT, spec)["b"].after_blocks == 6
    assert resolved(SHOT + NEXT + "after_blocks = 2\n", spec)["b"].after_blocks == 2
    assert resolved(SHOT + NEXT + 'history.policy = "full"\n', spec)["b"].after_blocks == 7
    assert resolved(SHOT.replace("5s", "1s") + NEXT, spec)["b"].after_blocks == 2


def test_order_of_rendering(spec: ModelSpec) -> None:
    text = NEXT + SHOT
    assert list(resolved(text, spec)) == ["a", "b"]


def test_what_comes_back_keeps_its_distance(spec: ModelSpec) -> None:
    history = resolved(SHOT + 'history = { policy = "retrieve" }\n', spec)["a"].history
    assert (history.retrieved_blocks, history.positions) == (4, "bounded")
    window = resolved(SHOT, spec)["a"].history
    assert (window.retrieved_blocks, window.positions) == (0, "relative")


def test_models_are_read_once_and_folders_are_the_films(spec: ModelSpec, tmp_path: Path) -> None:
    asked = []

    def read(name: str) -> ModelSpec:
        asked.append(name)
        return spec

    path = tmp_path / "films" / "film.toml"
    text = SHOT + SHOT.replace('"a"', '"b"') + 'model = "../models/x"\n' + SHOT.replace('"a"', '"c"')
    resolve(parse_film(text, str(path)), read)
    assert asked == ["mini", f"{tmp_path}/films/../models/x"]
    asked.clear()
    resolve(parse_film(SHOT + 'model = "/models/x"\n'), read)
    assert asked == ["/models/x"]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (SHOT + "size = [100, 161]\n", 5, "[100, 161] are no multiples of 16, as mini needs; write size = [96, 160]"),
        ("[film]\nsize = [16, 24]\n" + SHOT, 2, "film.size: [16, 24] are no multiples of 16, as"),
        (SHOT + 'codec = "bf17"\n', 5, "shot.codec: unknown codec 'bf17': did you mean 'bf16'?"),
        ("[film]\ncodec = 'bf17'\n" + SHOT, 2, "film.codec: unknown codec 'bf17'"),
        (SHOT + "history.retrieved_blocks = 2\n", 5, 'shot.history.retrieved_blocks: needs policy = "retrieve"'),
        (SHOT + 'history = { policy = "retrieve", positions = "absolute" }\n', 2, 'use "bounded" or "relative"'),
        (SHOT + "cache.tiers = { 2 = 'bf17' }\n", 5, "shot.cache.tiers.2: unknown codec 'bf17': did you mean 'bf16'?"),
        (SHOT + "cache.tiers = { 0 = 'bf16' }\n", 5, "shot.cache.tiers: tiers = [0]: ages are whole numbers from 1 on"),
        (SHOT + "cache.first = 'bf17'\n", 5, "shot.cache.first: unknown codec 'bf17'"),
        (SHOT + "codec = 'rtn4+rtn3'\n", 5, "shot.codec: unknown codec 'rtn3': did you mean 'rtn4'?"),
        (SHOT + "cache.important = 'bf16'\n", 5, "shot.cache.important: important is the codec of blocks that pruning"),
        (SHOT + "history.prune = { recent_blocks = 2, merge = [4, 2] }\n", 5, "prune.merge: tokens cannot be merged"),
        (SHOT + 'cache.first = "int8"\nhistory = { policy = "retrieve", retrieved_blocks = 2 }\n', 2, "and prune"),
        (SHOT + NEXT + "size = [64, 64]\n", 9, 'shot.after: "a" has another size; a shot starts'),
        (SHOT + NEXT + 'weights = "fp8"\n', 9, 'shot.after: "a" has weights of another precision; a shot'),
        (SHOT + NEXT + "after_blocks = 8\n", 10, 'shot.after_blocks: 8 is more than "a" has; write at most 7'),
    ],
)  # fmt: skip
def test_bad_input(spec: ModelSpec, text: str, line: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(text, spec)
    error = str(caught.value)
    assert error.startswith(f"film.toml:{line}: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_how_blocks_are_kept(spec: ModelSpec) -> None:
    text = (
        SHOT
        + "codec = 'rtn4+rtn2'\nattention = 'fp8'\n[shot.cache]\ntiers = { 2 = 'bf16' }\nrefresh = 4\nfirst = 'int8'\n"
    )
    config = resolved(text + "[shot.history]\nprune = { recent_blocks = 6, merge = [2, 2] }\n", spec)["a"]
    tiers = (TierConfig(age=2, codec="bf16"),)
    assert config.cache == CacheConfig(codec="rtn4+rtn2", tiers=tiers, refresh=4, first="int8")
    assert config.history.prune == PruneConfig(recent_blocks=6, important=0.1, keep=0.3, merge=(2, 2))
    assert config.attention == "fp8"
    plain = resolved(SHOT, spec)["a"]
    assert (plain.attention, plain.cache, plain.history.prune) == ("dense", CacheConfig(codec="int4"), None)


def test_an_unknown_model_names_the_line() -> None:
    def read(name: str) -> ModelSpec:
        raise ConfigError(f"unknown model {name!r}: did you mean 'mini'?")

    with pytest.raises(ConfigError, match=r"film\.toml:5: shot\.model: unknown model 'minni': did you mean 'mini'\?"):
        resolve(parse_film(SHOT + 'model = "minni"\n'), read)
    with pytest.raises(ConfigError, match=r"film\.toml:1: shot\.model: unknown model 'mini'"):
        resolve(parse_film(SHOT), read)


@pytest.mark.parametrize("name", ["~nobody-here/x", "a\\u0000/x", "x" * 5000 + "/x"])
@pytest.mark.parametrize("key", ["model", "image"])
def test_paths_that_are_none(spec: ModelSpec, key: str, name: str) -> None:
    def read(name: str) -> ModelSpec:
        Path(name).stat()
        return spec

    with pytest.raises(
        ConfigError, match=rf"film\.toml:5: shot\.{key}: .* cannot be read \(.*\); name an existing"
    ) as caught:
        resolve(parse_film(SHOT + f'{key} = "{name}"\n'), read if key == "model" else lambda name: spec)
    assert len(str(caught.value)) < 300


def test_window_keys_when_the_model_prefers_full(spec: ModelSpec) -> None:
    full = dataclasses.replace(spec, history=dataclasses.replace(spec.history, policy=HistoryPolicy.FULL))
    with pytest.raises(ConfigError, match=r"film\.toml:5: shot\.history\.recent_blocks: has no meaning"):
        resolved(SHOT + "history.recent_blocks = 2\n", full)


def test_switches_are_the_models_unless_a_beat_says(spec: ModelSpec) -> None:
    beats = '[[shot.beat]]\nat = "1s"\nprompt = "q"\n[[shot.beat]]\nat = "3s"\nprompt = "r"\nswitch = "flush"\n'
    recaching = dataclasses.replace(spec, switch=Switch.RECACHE)
    config = resolved(SHOT + beats + 'transition = "1s"\n', recaching)["a"]
    assert [beat.switch for beat in config.beats] == [Switch.KEEP, Switch.RECACHE, Switch.FLUSH]
    assert [beat.transition_s for beat in config.beats] == [0.0, 0.0, 1.0]


def test_settings_that_exclude_each_other_name_the_shot(spec: ModelSpec) -> None:
    rebuilt = dataclasses.replace(spec, sampler=dataclasses.replace(spec.sampler, write_back=WriteBack.REBUILD))
    with pytest.raises(ConfigError, match=r"film.toml:2: shot.name: shot 'a': mini rebuilds its history"):
        resolved(SHOT, rebuilt)
