"""What is said about a shot of the world: scenes, their prompts and back, training scripts, and staging them.

A script is a list of beats; each beat's prompt is in force from its moment until the next:

    at 0 s   "dusk, light rain. pan right slowly past the lighthouse"    time, weather, camera, landmark
    at 6 s   "hold still. a red boat enters from the left"               light and weather stay as they were

Shapes: W worlds, T frames, L landmarks, A actors, E events.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longtake.kernels.errors import ConfigError

from . import palette, shapes
from .draws import Floats, uniform
from .world import FPS, NEVER_S, NUM_ACTORS, NUM_EVENTS, RING_PX, WIDTH, WorldSpec

MAX_PROMPT_BYTES = 127  # and the end token
BEAT_GRID_S = 0.75  # a block: 3 latent frames of 4 frames each
MIN_BEAT_S = 3.0
MAX_PAN_PX = 4

_EDGE_PX = 14.0  # how far outside the picture the middle of an actor is at the moment it enters
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


@dataclass(frozen=True, slots=True)
class Beat:
    """A scene from `at_s` seconds on, and the prompt that says so."""

    at_s: float
    scene: Scene
    prompt: str


Script = tuple[Beat, ...]  # the first beat at 0

DEFAULT_SCENE = Scene("day", "clear", 0, (), None)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.random() * len(options))]


def _camera_phrase(scene: Scene, rng: np.random.Generator | None) -> str:
    landmark = scene.landmark or ""
    if scene.pan_px == 0:
        phrase = "hold still" if rng is None else _pick(rng, ("hold still", "hold still", "stand still", "stay still"))
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
        phrase = _pick(rng, forms)
    phrase = f"{phrase} past the {landmark}" if landmark else phrase
    return " ".join(phrase.split())


def _actor_phrase(actor: Actor, rng: np.random.Generator | None) -> str:
    name = f"{actor.colour} {actor.kind}"
    if actor.side is None:
        return name if rng is None else _pick(rng, (f"a {name}", f"a {name}", f"there is a {name}"))
    if rng is None:
        return f"{name} from the {actor.side}"
    forms = (
        f"a {name} enters from the {actor.side}",
        f"a {name} enters from the {actor.side}",
        f"a {name} comes in from the {actor.side}",
        f"a {name} from the {actor.side}",
        f"from the {actor.side} a {name} enters",
    )
    return _pick(rng, forms)


def _air_phrases(scene: Scene, base: Scene, said: tuple[bool, bool], rng: np.random.Generator | None) -> list[str]:
    phrases = []
    if said[0]:
        phrases.append(_pick(rng, _TIME_PHRASES[scene.time]) if rng else scene.time)
    if said[1]:
        if rng and scene.weather == "clear" and base.weather != "clear" and rng.random() < 0.5:
            phrases.append(_pick(rng, (_CLEARING[base.weather], "it clears up")))
        else:
            phrases.append(_pick(rng, _WEATHER_PHRASES[scene.weather]) if rng else scene.weather)
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
        parts = [_pick(rng, (", ", " with ", ". ")).join(air)] if air else []
        if camera_needed or extra[2]:
            parts.insert(int(rng.random() < 0.6) * len(parts), _camera_phrase(scene, rng))
        actors = [_actor_phrase(actor, rng) for actor in scene.actors]
        parts = actors + parts if rng.random() < 0.25 else parts + actors
        text = _pick(rng, (", ", ". ", ". ")).join(parts)
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


def first_frame(at_s: float) -> int:
    """Give the first frame in which a beat at `at_s` is in force."""
    return math.ceil(at_s * FPS - 1e-6)


def camera_path(script: Script, num_frames: int, start_angle_px: float) -> Floats:
    """Give the camera's angle at every frame, float64 [T]: the start plus the pans in force in the frames before."""
    pan = np.zeros(num_frames)
    for beat in script:
        pan[first_frame(beat.at_s) :] = beat.scene.pan_px
    return start_angle_px + np.concatenate([[0.0], np.cumsum(pan)[:-1]])[:num_frames]


class _Writer:
    """Writes one world's script."""

    def __init__(self, kinds_L: NDArray[np.int64], x_L: Floats, start_angle_px: float, seed: int) -> None:
        self.rng = np.random.Generator(np.random.Philox(key=seed))
        self.angle_px = start_angle_px
        self.num_actors = 0
        self._names = list(shapes.LANDMARKS)
        self._kinds_L, self._x_L = kinds_L, x_L

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def beat_times(self, duration_s: float, max_beats: int) -> list[float]:
        """Draw the moments of the beats, on the grid, MIN_BEAT_S or more apart and before the end."""
        gap = round(MIN_BEAT_S / BEAT_GRID_S)
        slots = int((duration_s + 1e-6) / BEAT_GRID_S)
        most = max(min(max_beats, slots // gap), 1)
        count = 1 if most == 1 or self.chance(0.45) else 2 + int(self.rng.random() * (most - 1))
        free = np.sort(self.rng.integers(0, slots - gap * count + 1, count - 1)) if count > 1 else []
        return [0.0, *(BEAT_GRID_S * (int(f) + gap * (index + 1)) for index, f in enumerate(free))]

    def pan(self, moving: bool = False) -> int:
        speed = int(np.searchsorted(np.cumsum([0.0 if moving else 0.1, 0.1, 0.25, 0.3]), self.rng.random(), "right"))
        return speed if self.chance(0.5) else -speed

    def camera_change(self, pan_px: int) -> int:
        """Stop, start, turn back or change speed; never as before."""
        u = self.rng.random()
        if pan_px and u < 0.25:
            return 0
        if pan_px and u < 0.6:
            return -pan_px
        while (new := self.pan(moving=True)) == pan_px or (pan_px and u < 0.85 and new * pan_px < 0):
            pass
        return new

    def time(self, but: str | None = None) -> str:
        while (name := _pick(self.rng, (*palette.TIMES, "day"))) == but:
            pass
        return name

    def weather(self, but: str | None = None) -> str:
        if but != "clear" and self.chance(0.75):
            return "clear"
        while (name := _pick(self.rng, palette.WEATHERS[1:])) == but:
            pass
        return name

    def actors(self, count: int, enter: float) -> tuple[Actor, ...]:
        """Draw up to `count` actors of different kinds and sides, each entering with probability `enter`."""
        count = min(count, NUM_ACTORS - self.num_actors)
        self.num_actors += count
        kinds = self.rng.permutation(list(shapes.ACTORS))[:count].tolist()
        sides = self.rng.permutation(["left", "right"]).tolist()
        return tuple(
            Actor(kind, _pick(self.rng, palette.COLOURS), sides[index % 2] if self.chance(enter) else None)
            for index, kind in enumerate(kinds)
        )

    def landmark(self, pan_px: int, num_frames: int) -> str | None:
        """Draw a landmark that comes into view within the beat, or is in view where the camera holds still."""
        if not self.chance(0.45 if pan_px else 0.3):
            return None
        if pan_px == 0:
            screen = (self._x_L - self.angle_px) % RING_PX
            good = (screen > 12) & (screen < WIDTH - 12)
        else:
            edge = self.angle_px + (WIDTH if pan_px > 0 else 0)
            way = ((self._x_L - edge) * np.sign(pan_px)) % RING_PX
            good = (way > 8) & (way < RING_PX - WIDTH - 8) & (way < abs(pan_px) * num_frames - 24)
        kinds = self._kinds_L[good & (self._kinds_L >= 0)]
        return self._names[kinds[int(self.rng.random() * len(kinds))]] if len(kinds) else None

    def scene(self, previous: Scene | None) -> Scene:
        """Draw a scene but for its landmark."""
        if previous is None:
            count = int(self.rng.random() < 0.5) + int(self.rng.random() < 0.2)
            return Scene(self.time(), self.weather(None), self.pan(), self.actors(count, 0.4), None)
        changes = self.rng.random(4) < (0.55, 0.25, 0.22, 0.45)
        if self.num_actors == NUM_ACTORS:
            changes[3] = False
        if not changes.any():
            changes[0] = True
        pan = self.camera_change(previous.pan_px) if changes[0] else previous.pan_px
        time = self.time(previous.time) if changes[1] else previous.time
        weather = self.weather(previous.weather) if changes[2] else previous.weather
        return Scene(time, weather, pan, self.actors(1 + int(self.chance(0.15)), 1.0) if changes[3] else (), None)

    def script(self, duration_s: float, max_beats: int) -> Script:
        times = self.beat_times(duration_s, max_beats)
        beats: list[Beat] = []
        previous: Scene | None = None
        for at_s, end_s in itertools.pairwise([*times, duration_s]):
            scene = self.scene(previous)
            frames = first_frame(end_s) - first_frame(at_s)
            scene = Scene(scene.time, scene.weather, scene.pan_px, scene.actors, self.landmark(scene.pan_px, frames))
            beats.append(Beat(at_s, scene, describe(scene, previous, self.rng)))
            self.angle_px += frames * scene.pan_px
            previous = scene
        return tuple(beats)


def random_scripts(
    worlds: WorldSpec, start_angle_W: Floats, duration_s: float, seeds: Sequence[int], max_beats: int = 3
) -> list[Script]:
    """Write a training script for every world; what it says of landmarks is true there.

    Args:
        worlds: W worlds on the CPU.
        start_angle_W: the camera's first angle, pixels of the landmark ring.
        duration_s: of the shot.
        seeds: W; a script depends on its own seed, world and angle alone.
        max_beats: the most beats a script has.
    """
    kinds, x = worlds.landmark_kind_WL.numpy(), worlds.landmark_x_WL.double().numpy()
    angles = np.asarray(start_angle_W, dtype=np.float64)
    rows = zip(kinds, x, angles.tolist(), seeds, strict=True)
    return [_Writer(k, place, angle, int(seed)).script(duration_s, max_beats) for k, place, angle, seed in rows]


@functools.cache
def _indices() -> tuple[dict[str, int], dict[str, int], dict[str, int], dict[str, int]]:
    tables = (palette.TIMES, palette.WEATHERS, tuple(shapes.ACTORS), palette.COLOURS)
    first, second, third, fourth = ({name: index for index, name in enumerate(names)} for names in tables)
    return first, second, third, fourth


def stage(worlds: WorldSpec, scripts: Sequence[Script], start_angle_W: Floats) -> WorldSpec:
    """Set the light, weather and actors of the worlds as their scripts say.

    An entering actor's nose is at the picture's edge at its beat's moment; it then crosses the picture at 8 to 24 px a
    second for as long as the camera moves as that beat says. An actor without a side stands still on the ring, inside
    the picture of its beat's first frame. A world's places and speeds depend on its seed and script alone.

    Args:
        worlds: W worlds.
        scripts: W.
        start_angle_W: the camera's first angle, pixels of the landmark ring.

    Raises:
        ConfigError: a script has more changes of light and weather, or more actors, than a world holds.
    """
    time_of, weather_of, kind_of, colour_of = _indices()
    count = len(scripts)
    draws = uniform(worlds.seeds_W.cpu().numpy(), "stage", 2 * NUM_ACTORS).reshape(count, NUM_ACTORS, 2)
    event_s = np.full((count, NUM_EVENTS), NEVER_S)
    times, weathers = np.zeros((2, count, NUM_EVENTS), dtype=np.int64)
    kinds, colours = np.full((count, NUM_ACTORS), -1), np.zeros((count, NUM_ACTORS), dtype=np.int64)
    enter_s, x, speed = np.zeros((3, count, NUM_ACTORS))
    for world, (script, angle) in enumerate(zip(scripts, np.asarray(start_angle_W).tolist(), strict=True)):
        event, actor, frame, pan = -1, 0, 0, 0
        for beat in script:
            angle += pan * (first_frame(beat.at_s) - frame)
            frame, pan = first_frame(beat.at_s), beat.scene.pan_px
            light = time_of[beat.scene.time], weather_of[beat.scene.weather]
            if event < 0 or light != (times[world, event], weathers[world, event]):
                event += 1
                if event == NUM_EVENTS:
                    raise ConfigError(f"light and weather change more than {NUM_EVENTS - 1} times: use fewer beats")
                event_s[world, event] = beat.at_s
                times[world, event], weathers[world, event] = light
            for somebody in beat.scene.actors:
                if actor == NUM_ACTORS:
                    raise ConfigError(f"a world holds {NUM_ACTORS} actors: bring fewer in its beats")
                u, v = draws[world, actor]
                kinds[world, actor], colours[world, actor] = kind_of[somebody.kind], colour_of[somebody.colour]
                enter_s[world, actor] = frame / FPS
                screen = 20.0 + (WIDTH - 40.0) * ((actor + u) / 2 % 1)  # two that stand do so apart
                if somebody.side is not None:
                    screen = -_EDGE_PX if somebody.side == "left" else WIDTH + _EDGE_PX
                    speed[world, actor] = pan * FPS + (8 + 16 * v) * (1 if somebody.side == "left" else -1)
                x[world, actor] = (angle + screen) % RING_PX
                actor += 1
    times = np.where(event_s < NEVER_S, times, times[:, :1])
    return worlds.set_events(event_s, times, weathers).set_actors(kinds, colours, enter_s, x, speed)
