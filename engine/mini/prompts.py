"""Scripts: what is said about a shot, beat by beat; training scripts, the camera's path, and staging the world.

A script is a list of beats; each beat's prompt is in force from its moment until the next:

    at 0 s   "dusk, light rain. pan right slowly past the lighthouse"    time, weather, camera, landmark
    at 6 s   "hold still. a red boat enters from the left"               light and weather stay as they were

Shapes: W worlds, T frames, L landmarks, A actors, E events.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longtake.kernels.errors import ConfigError

from . import palette, shapes
from .draws import Floats, uniform
from .grammar import DEFAULT_SCENE, MAX_PAN_PX, MAX_PROMPT_BYTES, Actor, Scene, describe, parse, pick, tokens
from .world import FPS, NEVER_S, NUM_ACTORS, NUM_EVENTS, RING_PX, WIDTH, WorldSpec

__all__ = [
    "BEAT_GRID_S",
    "DEFAULT_SCENE",
    "MAX_PAN_PX",
    "MAX_PROMPT_BYTES",
    "MIN_BEAT_S",
    "Actor",
    "Beat",
    "Scene",
    "Script",
    "camera_path",
    "describe",
    "first_frame",
    "parse",
    "random_scripts",
    "stage",
    "tokens",
]

BEAT_GRID_S = 0.75  # a block: 3 latent frames of 4 frames each
MIN_BEAT_S = 3.0
_EDGE_PX = 14.0  # how far outside the picture the middle of an actor is at the moment it enters


@dataclass(frozen=True, slots=True)
class Beat:
    """A scene from `at_s` seconds on, and the prompt that says so."""

    at_s: float
    scene: Scene
    prompt: str


Script = tuple[Beat, ...]  # the first beat at 0


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
        self._cast: list[str] = self.rng.permutation(list(shapes.ACTORS)).tolist()  # no kind twice
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
        free = sorted(self.rng.integers(0, slots - gap * count + 1, count - 1).tolist())
        return [0.0, *(BEAT_GRID_S * (f + gap * (index + 1)) for index, f in enumerate(free))]

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
        while (name := pick(self.rng, (*palette.TIMES, "day"))) == but:
            pass
        return name

    def weather(self, but: str | None = None) -> str:
        if but != "clear" and self.chance(0.75):
            return "clear"
        while (name := pick(self.rng, palette.WEATHERS[1:])) == but:
            pass
        return name

    def actors(self, count: int, enter: float) -> tuple[Actor, ...]:
        """Draw up to `count` actors, from different sides, each entering with probability `enter`."""
        count = min(count, NUM_ACTORS - self.num_actors)
        kinds = self._cast[self.num_actors : self.num_actors + count]
        self.num_actors += count
        sides = self.rng.permutation(["left", "right"]).tolist()
        return tuple(
            Actor(kind, pick(self.rng, palette.COLOURS), sides[index % 2] if self.chance(enter) else None)
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
