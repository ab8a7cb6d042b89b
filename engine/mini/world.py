"""A seeded procedural world seen by a turning camera, rendered as tensors with exact truth for any angle and time.

The camera stands in the middle of rings and pans over them; `angle_px` is its angle in pixels of the landmark ring. A
layer of speed f has its own ring of f * RING_PX pixels, so all that stands still is back, exactly, after one turn.

    far   f = 1/2   sun, moon, stars, clouds, mountains        mid   f = 3/4   hills
    near  f = 1     ground, landmarks, shore and water          actors move on the landmark ring, in front of it

Shapes: W worlds, T frames of a world, F = W*T, X columns, Y rows, L landmarks, A actors, P primitives, K fields of a
primitive, E events (changes of light and weather), N columns of a layer's texture, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from . import palette, shapes
from .draws import Floats, choice, uniform

HEIGHT, WIDTH, FPS = 96, 160, 16
RING_PX = 512
NUM_LANDMARKS, NUM_ACTORS, NUM_EVENTS = 13, 4, 8
FADE_S = 1.0
NEVER_S = 1e9
HORIZON_PX = 61.0
ROAD_PX = 72.0
MARGIN_PX = 24  # an actor further than this outside the picture is out of sight

_CLOUDS, _PUFFS, _PEAKS, _WAVES, _STARS = 5, 5, 8, 5, 26
_ACTOR_BASE = {"boat": (84.0, 88.0), "balloon": (38.0, 48.0), "bird": (30.0, 44.0), "cart": (72.0, 72.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSpec:
    """A batch of worlds as tensors, all float32 but where said.

    What stands still comes from the seed alone; events and actors are the script (`set_events`, `set_actors`).
    """

    seeds_W: Tensor  # int64
    landmark_WLPK: Tensor
    landmark_x_WL: Tensor
    landmark_base_WL: Tensor
    landmark_kind_WL: Tensor  # int64, -1: none
    peaks_WN4: Tensor  # x, height, half width, light
    clouds_WN4: Tensor  # x, y, radius x, radius y
    stars_WN3: Tensor  # x, y, brightness
    suns_W3: Tensor  # x on the far ring of the high sun, the low sun, the moon
    waves_W3N2: Tensor  # hills, ground, shore: amplitude and phase of each harmonic
    colours_W33: Tensor  # grass, sand, tint of the air
    event_s_WE: Tensor
    event_time_WE: Tensor  # int64, index into palette.TIMES
    event_weather_WE: Tensor  # int64, index into palette.WEATHERS
    actor_WAPK: Tensor
    actor_kind_WA: Tensor  # int64, index into shapes.ACTORS, -1: nobody
    actor_enter_s_WA: Tensor
    actor_x_WA: Tensor  # on the ring, when it enters
    actor_speed_WA: Tensor  # px a second on the ring
    actor_facing_WA: Tensor  # 1 right, -1 left
    actor_base_WA: Tensor
    actor_phase_WA: Tensor

    def to(self, device: torch.device | str) -> WorldSpec:
        """Return the same worlds on `device`."""
        return WorldSpec(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def take(self, index_R: Tensor) -> WorldSpec:
        """Return the worlds at these places of the batch, some several times; index_R: int64 [R], same device."""
        return WorldSpec(**{f.name: getattr(self, f.name)[index_R] for f in fields(self)})

    def set_events(self, time_s_WE: Floats, times_WE: np.ndarray, weathers_WE: np.ndarray) -> WorldSpec:
        """Return the worlds with these changes of light and weather, each fading in over FADE_S from its moment.

        Args:
            time_s_WE: [W, NUM_EVENTS], ascending; the first is in force from the start; NEVER_S where unused.
            times_WE: int, index into palette.TIMES.
            weathers_WE: int, index into palette.WEATHERS.
        """
        device = self.seeds_W.device
        return replace(
            self,
            event_s_WE=torch.as_tensor(time_s_WE, dtype=torch.float32, device=device),
            event_time_WE=torch.as_tensor(times_WE, dtype=torch.int64, device=device),
            event_weather_WE=torch.as_tensor(weathers_WE, dtype=torch.int64, device=device),
        )

    def set_actors(
        self, kinds_WA: np.ndarray, colours_WA: np.ndarray, enter_s_WA: Floats, x_WA: Floats, speed_WA: Floats
    ) -> WorldSpec:
        """Return the worlds with these actors.

        Args:
            kinds_WA: int [W, NUM_ACTORS], index into shapes.ACTORS, -1: nobody.
            colours_WA: int, index into palette.COLOURS.
            enter_s_WA: when each appears, seconds.
            x_WA: where on the ring, in pixels, at that moment.
            speed_WA: pixels a second on the ring, negative to the left.
        """
        shape = kinds_WA.shape
        seeds = self.seeds_W.cpu().numpy()
        u = uniform(seeds, "actor", 2 * NUM_ACTORS).reshape(shape[0], NUM_ACTORS, 2)[:, : shape[1]]
        ranges = np.array([_ACTOR_BASE[name] for name in shapes.ACTORS])[np.maximum(kinds_WA, 0)]
        table = shapes.actor_table(kinds_WA.reshape(-1), colours_WA.reshape(-1))
        values: dict[str, np.ndarray] = {
            "actor_WAPK": table.reshape(*shape, *table.shape[1:]),
            "actor_enter_s_WA": np.where(kinds_WA < 0, NEVER_S, enter_s_WA),
            "actor_x_WA": x_WA,
            "actor_speed_WA": speed_WA,
            "actor_facing_WA": np.where(speed_WA < 0, -1.0, 1.0),
            "actor_base_WA": np.round(ranges[..., 0] + (ranges[..., 1] - ranges[..., 0]) * u[..., 0]),
            "actor_phase_WA": u[..., 1] * 2 * np.pi,
        }
        device = self.seeds_W.device
        tensors = {name: torch.as_tensor(v, dtype=torch.float32, device=device) for name, v in values.items()}
        return replace(self, actor_kind_WA=torch.as_tensor(kinds_WA, dtype=torch.int64, device=device), **tensors)


def build_worlds(seeds: Sequence[int], device: torch.device | str = "cpu") -> WorldSpec:
    """Make the worlds of these seeds, each with a random light, weather and up to three actors.

    Args:
        seeds: W non-negative integers; a seed's world does not depend on the others of the batch.
        device: where the tensors go; the numbers are drawn on the CPU.
    """
    ids = np.asarray(seeds, dtype=np.int64)
    count = len(ids)
    kinds, x, base, table = _landmarks(ids)
    u = uniform(ids, "land", 5 + 3 * 2 * _WAVES)
    waves = u[:, 5:].reshape(count, 3, _WAVES, 2)
    amplitude = np.array([3.6, 1.1, 1.5])[:, None] / np.sqrt(np.arange(1, _WAVES + 1))
    waves = np.stack([amplitude * (0.35 + 0.65 * waves[..., 0]), 2 * np.pi * waves[..., 1]], -1)
    air = 0.94 + 0.12 * uniform(ids, "air", 3)
    grass = palette.GRASS[choice(u[:, 0], len(palette.GRASS))]
    sand = palette.SAND[choice(u[:, 1], len(palette.SAND))]
    far = RING_PX / 2

    def tensor(values: np.ndarray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(values), dtype=torch.float32)

    empty = torch.zeros(count, NUM_ACTORS)
    spec = WorldSpec(
        seeds_W=torch.as_tensor(ids),
        landmark_WLPK=tensor(table),
        landmark_x_WL=tensor(x),
        landmark_base_WL=tensor(base),
        landmark_kind_WL=torch.as_tensor(kinds),
        peaks_WN4=tensor(_peaks(ids)),
        clouds_WN4=tensor(_clouds(ids)),
        stars_WN3=tensor(uniform(ids, "stars", 3 * _STARS).reshape(count, _STARS, 3) * [far, 46.0, 1.0]),
        suns_W3=tensor(u[:, 2:5] * far),
        waves_W3N2=tensor(waves),
        colours_W33=tensor(np.stack([grass, sand, air], 1)),
        event_s_WE=torch.full((count, NUM_EVENTS), NEVER_S),
        event_time_WE=torch.zeros(count, NUM_EVENTS, dtype=torch.int64),
        event_weather_WE=torch.zeros(count, NUM_EVENTS, dtype=torch.int64),
        actor_WAPK=torch.zeros(count, NUM_ACTORS, shapes.MAX_ACTOR_PRIMITIVES, shapes.NUM_FIELDS),
        actor_kind_WA=torch.full((count, NUM_ACTORS), -1),
        actor_enter_s_WA=empty + NEVER_S,
        actor_x_WA=empty,
        actor_speed_WA=empty,
        actor_facing_WA=empty + 1,
        actor_base_WA=empty + 60,
        actor_phase_WA=empty,
    )
    return _random_script(spec, ids).to(device)


def _landmarks(ids: np.ndarray) -> tuple[np.ndarray, Floats, Floats, Floats]:
    count = len(ids)
    u = uniform(ids, "landmarks", NUM_LANDMARKS * 16 + 1)
    number = 10 + choice(u[:, -1], NUM_LANDMARKS - 9)
    u = u[:, :-1].reshape(count, NUM_LANDMARKS, 16)
    slot = np.arange(NUM_LANDMARKS)
    x = (slot + 0.5 + 0.42 * (u[..., 0] - 0.5)) / number[:, None] * RING_PX
    base = np.round(66 + 3.5 * u[..., 1])
    # Kinds are dealt, not drawn: a ring shows every kind once before any twice, so a name points at one place.
    order = np.argsort(uniform(ids, "kinds", len(shapes.LANDMARKS)), 1)
    trees = [list(shapes.LANDMARKS).index(name) for name in ("pines", "oak", "poplars", "cottage")]
    extra = np.asarray(trees)[choice(uniform(ids, "extra", NUM_LANDMARKS), len(trees))]
    kinds = np.where(slot < order.shape[1], order[:, np.minimum(slot, order.shape[1] - 1)], extra)
    shuffled = np.argsort(np.where(slot < number[:, None], uniform(ids, "place", NUM_LANDMARKS), 2.0), 1)
    kinds = np.take_along_axis(kinds, shuffled, 1)
    kinds = np.where(slot < number[:, None], kinds, -1)
    table = shapes.landmark_table(kinds.reshape(-1), u[..., 2:].reshape(-1, 14))
    return kinds, x, base, table.reshape(count, NUM_LANDMARKS, *table.shape[1:])


def _peaks(ids: np.ndarray) -> Floats:
    u = uniform(ids, "peaks", _PEAKS * 4).reshape(len(ids), _PEAKS, 4)
    x = (np.arange(_PEAKS) + 0.8 * u[..., 0]) / _PEAKS * RING_PX / 2
    height = 9 + 17 * u[..., 1] ** 1.3
    return np.stack([x, height, height * (1.25 + 0.7 * u[..., 2]), 0.6 + 0.4 * u[..., 3]], -1)


def _clouds(ids: np.ndarray) -> Floats:
    u = uniform(ids, "clouds", _CLOUDS * (4 + 3 * _PUFFS)).reshape(len(ids), _CLOUDS, -1)
    size = np.where(u[..., 3] < 0.85, 0.7 + 0.7 * u[..., 2], 0.0)[..., None]
    x = ((np.arange(_CLOUDS) + 0.7 * u[..., 0]) / _CLOUDS * RING_PX / 2)[..., None]
    y = (9 + 22 * u[..., 1])[..., None]
    puff = u[..., 4:].reshape(*u.shape[:2], _PUFFS, 3)
    place = np.arange(_PUFFS) - (_PUFFS - 1) / 2
    x = x + size * (place * 5.4 + 2 * (puff[..., 0] - 0.5))
    y = y + size * (0.55 * place**2 - 2.2 * puff[..., 1])
    radius = size * (7.4 - 1.1 * np.abs(place) + 2.0 * puff[..., 2])
    return np.stack([x, y, radius, radius * 0.62], -1).reshape(len(ids), _CLOUDS * _PUFFS, 4)


def _random_script(spec: WorldSpec, ids: np.ndarray) -> WorldSpec:
    count = len(ids)
    u = uniform(ids, "script", 2 + 5 * NUM_ACTORS)
    times = np.repeat(choice(u[:, :1], len(palette.TIMES)), NUM_EVENTS, 1)
    weathers = np.repeat(np.maximum(choice(u[:, 1:2], 6) - 2, 0), NUM_EVENTS, 1)
    start = np.full((count, NUM_EVENTS), NEVER_S)
    start[:, 0] = 0.0
    a = u[:, 2:].reshape(count, NUM_ACTORS, 5)
    kinds = np.where(np.arange(NUM_ACTORS) < NUM_ACTORS - 1, choice(a[..., 0], 6), 9)
    kinds = np.where(kinds < len(shapes.ACTORS), kinds, -1)
    speed = np.where(a[..., 2] < 0.5, -1, 1) * (8 + 16 * a[..., 3])
    colours = choice(a[..., 1], len(palette.COLOURS))
    spec = spec.set_events(start, times, weathers)
    return spec.set_actors(kinds, colours, np.zeros((count, NUM_ACTORS)), a[..., 4] * RING_PX, speed)


def sky_weights(spec: WorldSpec, time_s_WT: Tensor) -> tuple[Tensor, Tensor]:
    """Give how much of each time of day and each weather holds.

    Args:
        time_s_WT: seconds.

    Returns:
        float32 [W, T, 4] by palette.TIMES and [W, T, 4] by palette.WEATHERS, each summing to 1.
    """
    one_time = torch.nn.functional.one_hot(spec.event_time_WE, len(palette.TIMES)).float()
    one_weather = torch.nn.functional.one_hot(spec.event_weather_WE, len(palette.WEATHERS)).float()
    times = one_time[:, None, 0].expand(-1, time_s_WT.shape[1], -1)
    weathers = one_weather[:, None, 0].expand(-1, time_s_WT.shape[1], -1)
    for event in range(1, NUM_EVENTS):
        ramp = ((time_s_WT.float() - spec.event_s_WE[:, event, None]) / FADE_S).clamp(0, 1)[..., None]
        times = times * (1 - ramp) + one_time[:, None, event] * ramp
        weathers = weathers * (1 - ramp) + one_weather[:, None, event] * ramp
    return times, weathers
