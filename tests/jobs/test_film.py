"""A film's file: what each key means, what is inherited, and the order of shots."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import pytest

from longtake.jobs.film import Beat, Film, load_film, parse_film
from longtake.jobs.film_settings import Cache, History, Prune
from longtake.kernels.errors import ConfigError

HARBOUR = """\
[film]
title = "Harbour"
model = "mini"
seed = 7
size = [96, 160]
[film.history]
policy = "window"
sink_blocks = 1
recent_blocks = 6
[film.cache]
device = "6GiB"
host = "64GiB"
[[shot]]
name = "arrival"
duration = "45s"
prompt = "pan right slowly past the lighthouse"
[[shot.beat]]
at = "12s"
prompt = "a red boat enters from the left"
[[shot]]
name = "quay"
duration = "20s"
after = "arrival"
prompt = "..."
"""
SHOT = '[[shot]]\nname = "a"\nduration = "9s"\nprompt = "p"\n'


def test_the_film_of_the_design() -> None:
    film = parse_film(HARBOUR)
    assert film.title == "Harbour"
    arrival, quay = film.shots
    assert (arrival.name, arrival.duration_s, arrival.after) == ("arrival", Fraction(45), None)
    assert arrival.beats == (Beat(at_s=Fraction(12), prompt="a red boat enters from the left"),)
    assert (quay.after, quay.after_blocks, quay.beats) == ("arrival", None, ())
    for shot in film.shots:
        assert shot.settings.seed == 7
        assert shot.settings.size == (96, 160)
        assert shot.settings.fps is None
        assert shot.settings.history == History(policy="window", sink_blocks=1, recent_blocks=6)
        assert shot.settings.cache == Cache(device_bytes=6 << 30, host_bytes=64 << 30)


def test_a_shot_overrides_key_by_key() -> None:
    film = parse_film(
        HARBOUR
        + """\
size = "480p"
fps = 24
seed = 8
codec = "int4"
steps = 2
model = "./models/other"
history = { recent_blocks = 3, positions = "absolute" }
cache.disk = "1TiB"
"""
    )
    settings = film.shots[1].settings
    assert film.shots[0].settings.size == (96, 160)
    assert (settings.size, settings.fps, settings.seed, settings.codec) == ((480, 832), 24, 8, "int4")
    assert (settings.steps, settings.model) == (2, "./models/other")
    assert settings.history == History(policy="window", sink_blocks=1, recent_blocks=3, positions="absolute")
    assert settings.cache == Cache(device_bytes=6 << 30, host_bytes=64 << 30, disk_bytes=1 << 40)


def test_how_blocks_are_kept() -> None:
    film = parse_film(
        "[film]\nattention = 'fp8'\n[film.cache]\nfirst = 'bf16'\ntiers = { 6 = 'int4', 2 = 'bf16' }\nrefresh = 4\n"
        "[film.history]\nprune = { recent_blocks = 6, important = 0, merge = [2, 5] }\n" + SHOT + "cache.tiers = {}\n"
        "cache.important = 'int8'\n" + SHOT.replace('"a"', '"b"')
    )
    first, second = (shot.settings for shot in film.shots)
    assert (first.attention, second.attention) == ("fp8", "fp8")
    assert second.cache == Cache(first="bf16", tiers=((2, "bf16"), (6, "int4")), refresh=4)
    assert first.cache == Cache(first="bf16", tiers=(), refresh=4, important="int8")
    assert first.history.prune == Prune(recent_blocks=6, important=0.0, merge=(2, 5))


def test_keys_without_meaning_are_dropped_when_inherited() -> None:
    text = (
        '[film.history]\npolicy = "retrieve"\nrecent_blocks = 4\nretrieved_blocks = 2\n'
        + SHOT
        + 'history.policy = "full"\n'
    )
    assert parse_film(text).shots[0].settings.history == History(policy="full")


def test_defaults() -> None:
    film = parse_film(SHOT, "somewhere/harbour.toml")
    assert film.title == "harbour"
    settings = film.shots[0].settings
    assert (settings.model, settings.seed, settings.size, settings.history) == ("mini", 0, None, History())


def test_a_file_from_windows(tmp_path: Path) -> None:
    path = tmp_path / "film.toml"
    path.write_bytes(b"\xef\xbb\xbf" + SHOT.replace("\n", "\r\n").encode())
    assert load_film(path).shots == parse_film(SHOT).shots


def chain(*pairs: tuple[str, str | None]) -> Film:
    text = "".join(
        f'[[shot]]\nname = "{name}"\nduration = "9s"\nprompt = "p"\n' + (f'after = "{after}"\n' if after else "")
        for name, after in pairs
    )
    return parse_film(text)


def test_render_order_is_the_films_order_but_for_after() -> None:
    film = chain(("d", "b"), ("a", None), ("b", "c"), ("c", None), ("e", "a"))
    assert [shot.name for shot in film.render_order()] == ["c", "b", "d", "a", "e"]
    long = chain(*((f"s{i}", f"s{i + 1}") for i in range(300)), ("s300", None))
    assert [shot.name for shot in long.render_order()] == [f"s{i}" for i in range(300, -1, -1)]


def test_shot_by_name() -> None:
    film = parse_film(HARBOUR)
    assert film.shot("quay") is film.shots[1]
    with pytest.raises(ConfigError, match=r'there is no shot "quai"; did you mean "quay"?'):
        film.shot("quai")


def test_key_finds_where_a_setting_comes_from() -> None:
    film = parse_film(HARBOUR + "seed = 9\n")
    assert film.key(film.shots[0], "seed") == ("film", "seed")
    assert film.key(film.shots[1], "seed") == ("shot", 1, "seed")
    assert film.key(film.shots[1], "history", "policy") == ("film", "history", "policy")
    assert film.key(film.shots[1], "fps") == ("shot", 1, "fps")
    assert str(film.source.error(film.key(film.shots[1], "fps"), "x")) == "film.toml:20: shot.fps: x"


def test_content_hash_is_of_what_the_film_says() -> None:
    film = parse_film(HARBOUR)
    assert film.content_hash == "4c88c0babaf77936f92a4ee2834bfe16"
    same = parse_film("# a comment\n" + HARBOUR.replace("45s", "0m45s"), "other.toml")
    assert same == film
    assert same.content_hash == film.content_hash
    for change in (("seed = 7", "seed = 8"), ("45s", "46s"), ("Harbour", "Port"), ("6GiB", "7GiB"), ("red", "blue")):
        assert parse_film(HARBOUR.replace(*change)).content_hash != film.content_hash


def test_json_has_every_setting() -> None:
    data = json.loads(json.dumps(parse_film(HARBOUR).to_json()))
    assert data["title"] == "Harbour"
    assert data["shots"][0]["beats"] == [
        {"at_s": 12.0, "prompt": "a red boat enters from the left", "switch": None, "transition_s": 0.0}
    ]
    assert data["shots"][1]["settings"]["cache"] == {
        "device_bytes": 6 << 30,
        "host_bytes": 64 << 30,
        "disk_bytes": None,
        **dict.fromkeys(("keep", "disk_io", "tiers", "refresh", "first", "first_blocks", "important")),
    }


def test_a_film_is_frozen() -> None:
    film = parse_film(HARBOUR)
    with pytest.raises(dataclasses.FrozenInstanceError):
        film.title = "x"  # type: ignore[misc]


START = '[[shot]]\nname = "a"\nduration = "5s"\nprompt = "p"\n'


def test_starts_and_switches() -> None:
    text = START + 'video = "in.mp4"\nstrength = 1\n'
    text += 'history.jitter = 0.5\nhistory.head_jitter = 0.8\nhistory.positions = "bounded"\n'
    beat = '[[shot.beat]]\nat = "2s"\nprompt = "q"\nswitch = "cut"\ntransition = "1.5s"\n'
    (shot,) = parse_film(text + beat).shots
    assert (shot.video, shot.strength, shot.image, shot.clip) == ("in.mp4", 1.0, None, None)
    history = shot.settings.history
    assert (history.jitter, history.head_jitter, history.positions) == (0.5, 0.8, "bounded")
    assert (shot.beats[0].switch, shot.beats[0].transition_s) == ("cut", Fraction(3, 2))
    (shot,) = parse_film(START + 'clip = "in.mp4"\nafter_blocks = 2\n').shots
    assert (shot.clip, shot.after_blocks) == ("in.mp4", 2)
