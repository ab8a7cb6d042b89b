"""What a moment of the world shows, said in a prompt and read back from one.

"dusk, light rain. pan right slowly past the lighthouse, a red boat enters from the left"
 light, weather    camera            landmark            actor
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longtake.kernels.errors import ConfigError

from . import palette, shapes

MAX_PROMPT_BYTES = 127  # and the end token
MAX_PAN_PX = 4

_SPEED_WORDS = {1: "very slowly", 2: "slowly", 3: "", 4: "quickly"}
_TIME_PHRASES = {
    "dawn": ("dawn", "at dawn", "early morning"),
    "day": ("day", "by day", "daylight"),
    "dusk": ("dusk", "at dusk", "evening"),
    "night": ("night", "at night", "by night"),
}
_WEATHER_PHRASES = {
    "clear": ("clear", "clear sky", "clear weather"),
    "fog": ("fog", "foggy", "mist"),
    "rain": ("rain", "light rain", "it rains"),
    "snow": ("snow", "light snow", "it snows"),
}
_WEATHER_NOUNS = frozenset(["clear sky", "clear weather", "fog", "mist", "rain", "light rain", "snow", "light snow"])
_CLEARING = {"fog": "the fog lifts", "rain": "the rain stops", "snow": "the snow stops"}
_TIME_WORDS = {
    "dawn": ("dawn", "sunrise", "morning"),
    "day": ("day", "daytime", "daylight", "noon", "midday", "afternoon"),
    "dusk": ("dusk", "sunset", "evening", "twilight"),
    "night": ("night", "midnight", "nighttime"),
}
_WEATHER_WORDS = {
    "clear": ("clear", "clears", "sunny", "cloudless"),
    "fog": ("fog", "foggy", "mist", "misty"),
    "rain": ("rain", "rains", "rainy", "raining"),
    "snow": ("snow", "snows", "snowy", "snowing"),
}
_TIME_OF = {word: name for name, words in _TIME_WORDS.items() for word in words}
_WEATHER_OF = {word: name for name, words in _WEATHER_WORDS.items() for word in words}
_ACTOR_OF = {name + ending: name for name in shapes.ACTORS for ending in ("", "s")}
_PAN_VERBS = frozenset(
    [
        "pan",
        "pans",
        "panning",
        "turn",
        "turns",
        "turning",
        "camera",
        "look",
        "looks",
        "move",
        "moves",
        "moving",
        "sweep",
        "sweeps",
    ]
)
_HOLD_VERBS = frozenset(
    ["hold", "holds", "stop", "stops", "stay", "stays", "stand", "stands", "static", "halt", "halts"]
)
_OVER = frozenset(["stop", "stops", "end", "ends", "lift", "lifts", "no", "without", "over"])
_SPEED_OF = {"slowly": 2, "slow": 2, "quickly": 4, "quick": 4, "fast": 4}
_CAMERA_FILLERS = frozenset(["left", "right", "very", "to", "the", *_SPEED_OF])
_CLAUSES = re.compile(r"[^a-z\s'-]+|\b(?:and|while|then|as|with)\b")
_LANDMARK = re.compile(r"\b(" + "|".join(shapes.LANDMARKS) + r")\b")
_SIDE = re.compile(r"\bfrom (?:the )?(left|right)\b")


@dataclass(frozen=True, slots=True)
class Actor:
    """Somebody a beat brings: it enters from `side` ("left", "right") at the beat's moment; None: it is just there."""

    kind: str
    colour: str
    side: str | None


@dataclass(frozen=True, slots=True)
class Scene:
    """What a beat says: light, weather and camera hold until changed; `actors` and `landmark` are this beat's alone.

    `pan_px` is the camera's speed in pixels a frame, right positive. `landmark` comes into view while the camera pans,
    or is in view where it holds still.
    """

    time: str
    weather: str
    pan_px: int
    actors: tuple[Actor, ...]
    landmark: str | None


DEFAULT_SCENE = Scene("day", "clear", 0, (), None)


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Draw one of the options."""
    return options[int(rng.random() * len(options))]


def _camera_phrase(scene: Scene, rng: np.random.Generator | None) -> str:
    landmark = scene.landmark or ""
    if scene.pan_px == 0:
        phrase = "hold still" if rng is None else pick(rng, ("hold still", "hold still", "stand still", "stay still"))
        if rng is not None and rng.random() < 0.2:
            phrase = "the camera holds still"
        return f"{phrase} by the {landmark}" if landmark else phrase
    direction = "right" if scene.pan_px > 0 else "left"
    speed = _SPEED_WORDS[abs(scene.pan_px)]
    phrase = f"pan {direction} {speed}"
    if rng is not None:
        forms = (
            phrase,
            phrase,
            f"pan {speed} {direction}",
            f"{speed} pan {direction}",
            f"pan {speed} to the {direction}",
            f"the camera pans {direction} {speed}",
            f"turn {direction} {speed}",
        )
        phrase = pick(rng, forms)
    phrase = f"{phrase} past the {landmark}" if landmark else phrase
    return " ".join(phrase.split())


def _actor_phrase(actor: Actor, rng: np.random.Generator | None) -> str:
    name = f"{actor.colour} {actor.kind}"
    if actor.side is None:
        return name if rng is None else pick(rng, (f"a {name}", f"a {name}", f"there is a {name}"))
    if rng is None:
        return f"{name} from the {actor.side}"
    forms = (
        f"a {name} enters from the {actor.side}",
        f"a {name} enters from the {actor.side}",
        f"a {name} comes in from the {actor.side}",
        f"a {name} from the {actor.side}",
        f"from the {actor.side} a {name} enters",
    )
    return pick(rng, forms)


def _air_phrases(scene: Scene, base: Scene, said: tuple[bool, bool], rng: np.random.Generator | None) -> list[str]:
    phrases = []
    if said[0]:
        phrases.append(pick(rng, _TIME_PHRASES[scene.time]) if rng else scene.time)
    if said[1]:
        if rng and scene.weather == "clear" and base.weather != "clear" and rng.random() < 0.5:
            phrases.append(pick(rng, (_CLEARING[base.weather], "it clears up")))
        else:
            phrases.append(pick(rng, _WEATHER_PHRASES[scene.weather]) if rng else scene.weather)
    return phrases


def _check(scene: Scene) -> None:
    known = scene.time in palette.TIMES and scene.weather in palette.WEATHERS and abs(scene.pan_px) <= MAX_PAN_PX
    known = known and (scene.landmark is None or scene.landmark in shapes.LANDMARKS)
    for actor in scene.actors:
        known = known and actor.kind in shapes.ACTORS and actor.colour in palette.COLOURS
        known = known and actor.side in (None, "left", "right")
    if not known:
        raise ConfigError(f"mini's world cannot show {scene}; see palette.py and shapes.py for what it has")


def describe(scene: Scene, previous: Scene | None, rng: np.random.Generator) -> str:
    """Say a scene in words.

    Args:
        scene: what to say.
        previous: the beat before, of which only the changes need be said; None for a shot's first beat, where day,
            clear and a still camera need not be said.
        rng: chooses words, order and what is said though it need not be.

    Returns:
        A prompt of at most MAX_PROMPT_BYTES bytes that `parse` turns back into `scene`.

    Raises:
        ConfigError: the world has no such thing, or the scene is too long to say.
    """
    _check(scene)
    base = previous or DEFAULT_SCENE
    needed = (scene.time != base.time, scene.weather != base.weather)
    camera_needed = scene.pan_px != base.pan_px or scene.landmark is not None
    if not any(needed) and not scene.actors:
        camera_needed = True  # an empty prompt says nothing
    for _ in range(3):
        everything = rng.random() < 0.25
        extra = [everything or rng.random() < (0.25 if previous is None else 0.06) for _ in range(3)]
        air = _air_phrases(scene, base, (needed[0] or extra[0], needed[1] or extra[1]), rng)
        nouns = len(air) == 2 and air[1] in _WEATHER_NOUNS
        parts = [pick(rng, (", ", " with " if nouns else ", ", ". ")).join(air)] if air else []
        if camera_needed or extra[2]:
            parts.insert(int(rng.random() < 0.6) * len(parts), _camera_phrase(scene, rng))
        actors = [_actor_phrase(actor, rng) for actor in scene.actors]
        parts = actors + parts if rng.random() < 0.25 else parts + actors
        text = pick(rng, (", ", ". ", ". ")).join(parts)
        if rng.random() < 0.2:
            text = text[0].upper() + text[1:] + "."
        if len(text.encode()) <= MAX_PROMPT_BYTES:
            return text
    parts = _air_phrases(scene, base, needed, None)
    parts += [_camera_phrase(scene, None)] if camera_needed else []
    text = ", ".join(parts + [_actor_phrase(actor, None) for actor in scene.actors])
    if len(text.encode()) > MAX_PROMPT_BYTES:
        raise ConfigError(
            f"{scene} takes {len(text.encode())} bytes to say, {MAX_PROMPT_BYTES} fit: bring fewer actors"
        )
    return text


def _parse_camera(words: list[str], pan_px: int) -> int | None:
    """Give the pan that a clause's words order, if any; `pan_px` is the one before."""
    pans = not _PAN_VERBS.isdisjoint(words)
    if not _HOLD_VERBS.isdisjoint(words):
        return 0
    if not pans and (not words or not _CAMERA_FILLERS.issuperset(words) or {"left", "right"}.isdisjoint(words)):
        return None
    directions = [word for word in words if word in ("left", "right")]
    speeds = [index for index, word in enumerate(words) if word in _SPEED_OF]
    if not directions and not speeds and "pan" not in words and "pans" not in words:
        return None
    sign = (1 if directions[0] == "right" else -1) if directions else (-1 if pan_px < 0 else 1)
    speed = 3
    if speeds:
        speed = _SPEED_OF[words[speeds[0]]]
        if speed == 2 and speeds[0] > 0 and words[speeds[0] - 1] == "very":
            speed = 1
    return sign * speed


def _parse_actors(words: list[str], places: list[int], side: str | None) -> list[Actor]:
    """Read a clause's actors, whose kinds stand at `places`; its side is that of the last."""
    actors = []
    for index, place in enumerate(places):
        start = places[index - 1] + 1 if index else 0
        colours = [word for word in words[start:place] if word in palette.COLOURS]
        last = index == len(places) - 1
        colour = colours[-1] if colours else palette.COLOURS[0]
        actors.append(Actor(_ACTOR_OF[words[place]], colour, side if last else None))
    return actors


def parse(prompt: str, previous: Scene | None = None) -> Scene:
    """Read a prompt: the inverse of `describe`.

    Args:
        prompt: any text; case, punctuation and unknown words do not matter.
        previous: the beat before, which holds where the prompt says nothing; None for a shot's first beat.

    Returns:
        The scene. An actor without a colour is red.
    """
    base = previous or DEFAULT_SCENE
    time, weather, pan_px = base.time, base.weather, base.pan_px
    landmark: str | None = None
    actors: list[Actor] = []
    for clause in _CLAUSES.split(prompt.lower()):
        text = " ".join(re.findall("[a-z]+", clause))
        words = text.split()
        named = _LANDMARK.search(text)
        landmark = named.group(1) if named else landmark
        times = [_TIME_OF[word] for word in words if word in _TIME_OF]
        weathers = [_WEATHER_OF[word] for word in words if word in _WEATHER_OF]
        time = times[-1] if times else time
        if weathers and not _OVER.isdisjoint(words):
            weather = "clear"
            continue
        weather = weathers[-1] if weathers else weather
        places = [index for index, word in enumerate(words) if word in _ACTOR_OF]
        if places:
            side = _SIDE.search(text)
            actors += _parse_actors(words, places, side.group(1) if side else None)
            words = words[: places[0]]
        pan = _parse_camera(_SIDE.sub("", " ".join(words)).split(), pan_px)
        pan_px = pan_px if pan is None else pan
    return Scene(time, weather, pan_px, tuple(actors), landmark)


def tokens(prompt: str, length: int = 128) -> NDArray[np.uint16]:
    """Turn a prompt into ByT5's token ids: bytes + 3, the end token 1, then zeros; uint16 [length]."""
    ids = np.zeros(length, dtype=np.uint16)
    data = np.frombuffer(prompt.encode()[: length - 1], dtype=np.uint8)
    ids[: len(data)] = data.astype(np.uint16) + 3
    ids[len(data)] = 1
    return ids
