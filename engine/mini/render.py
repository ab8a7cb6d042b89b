"""Frames of the world for any camera angle and time. Shapes: see world.py; a canvas is [F, X, 3, Y]."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import palette, panorama, shapes
from .panorama import Panorama, paint, paint_sprites
from .world import HEIGHT, HORIZON_PX, MARGIN_PX, NUM_ACTORS, RING_PX, WIDTH, WorldSpec, sky_weights

_SIDE_PX = 48  # room for actors on both sides of the canvas
_ACTOR_COLUMNS, _ACTOR_ROWS, _ACTOR_BELOW = 48, 42, 6
_TILE_PX = 128
_GRAIN = 64  # camera angles are resolved to 1 / _GRAIN px, so that a whole turn changes no bit


def render(
    worlds: WorldSpec,
    angle_px: Tensor,
    time_s: Tensor,
    *,
    painted: Panorama | None = None,
    painted_row_W: Tensor | None = None,
    frames_at_once: int = 640,
) -> Tensor:
    """Render frames.

    Args:
        worlds: W worlds; the frames come out on their device.
        angle_px: [W, T] the camera's angle in pixels of the landmark ring, any value.
        time_s: [W, T] seconds since the shot's start.
        painted: `paint(worlds)` if it is at hand.
        painted_row_W: int64, each world's row in `painted`, if that is not their order.
        frames_at_once: bounds the memory in use.

    Returns:
        float32 [W, T, 3, HEIGHT, WIDTH] in [0, 1].
    """
    painted = painted or paint(worlds)
    device = worlds.seeds_W.device
    num_worlds, num_frames = angle_px.shape
    angle_F = torch.round(angle_px.to(device, torch.float64).reshape(-1) * _GRAIN) / _GRAIN
    time_F = time_s.to(device, torch.float64).reshape(-1)
    world_F = torch.arange(num_worlds, device=device).repeat_interleave(num_frames)
    row_F = world_F if painted_row_W is None else painted_row_W.to(device)[world_F]
    times, weathers = sky_weights(worlds, time_s.to(device))
    times, weathers = times.reshape(-1, times.shape[-1]), weathers.reshape(-1, weathers.shape[-1])
    out = torch.empty(num_worlds * num_frames, 3, HEIGHT, WIDTH, device=device)
    for start in range(0, len(angle_F), frames_at_once):
        part = slice(start, start + frames_at_once)
        air = _air(worlds, world_F[part], times[part], weathers[part])
        canvas = _scene(painted, air, row_F[part], angle_F[part], time_F[part])
        _actors(worlds, air, canvas, world_F[part], angle_F[part], time_F[part])
        picture = canvas[:, _SIDE_PX : _SIDE_PX + WIDTH]
        picture = _precipitation(picture, weathers[part], angle_F[part], time_F[part])
        out[part] = picture.permute(0, 2, 3, 1).clamp(0, 1)
    return out.view(num_worlds, num_frames, 3, HEIGHT, WIDTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Air:
    """Light and weather of each frame, [F, 1, 3, 1] colours and [F, 1, 1, 1] amounts."""

    colours: dict[str, Tensor]
    sun_glow: Tensor  # high sun, low sun, night sky: [F, 3, 1, 1, 1]
    windows: Tensor
    fog: Tensor
    overcast: Tensor


def _air(worlds: WorldSpec, world_F: Tensor, times: Tensor, weathers: Tensor) -> _Air:
    device = times.device

    def table(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=device)

    overcast = (weathers @ table(palette.OVERCAST))[:, None]
    tint = worlds.colours_W33[world_F, 2]
    colours = {}
    for name, values in palette.SKY.items():
        colour = times @ table(values)
        if name in ("zenith", "middle", "horizon", "mountain", "hill", "shallow", "deep"):
            colour = colour * tint
        if name == "ambient":
            colour = colour * (1 - 0.16 * overcast)
        else:
            grey = 0.86 * colour.mean(1, keepdim=True) + 0.04
            colour = torch.lerp(colour, grey * table([0.98, 1.0, 1.03]), overcast * 0.75)
        colours[name] = colour[:, None, :, None]
    clear = 1 - overcast
    glow = torch.stack([times[:, 1:2] * clear, (times[:, 0:1] + times[:, 2:3]) * clear, times[:, 3:4] * clear], 1)
    return _Air(
        colours=colours,
        sun_glow=glow[..., None, None],
        windows=(times @ table(palette.WINDOW_GLOW))[:, None, None, None],
        fog=(weathers @ table(palette.FOG))[:, None, None, None],
        overcast=overcast[:, :, None, None],
    )


def _sample(texture_WNCY: Tensor, world_F: Tensor, angle_F: Tensor, speed: float, density: int) -> Tensor:
    """Take each frame's columns out of a layer; returns [F, X, C, Y]."""
    worlds, columns, channels, rows = texture_WNCY.shape
    start = angle_F * (speed * density)
    whole = torch.floor(start)
    fraction = (start - whole).float()[:, None, None, None]
    step = torch.arange(WIDTH, device=angle_F.device) * density
    flat = texture_WNCY.reshape(worlds * columns, channels * rows)

    def columns_from(first: Tensor) -> Tensor:
        index = torch.remainder(first.long()[:, None] + step, columns) + world_F[:, None] * columns
        picked = flat.index_select(0, index.reshape(-1))
        return picked.view(len(angle_F), WIDTH, channels, rows)

    left = columns_from(whole)
    if not bool((fraction > 0).any()):
        return left
    return torch.lerp(left, columns_from(whole + 1), fraction)


def _scene(painted: Panorama, air: _Air, row_F: Tensor, angle_F: Tensor, time_F: Tensor) -> Tensor:
    """Paint all but the actors and what falls; returns a canvas with room at its sides."""
    c = air.colours
    device = row_F.device
    y = (torch.arange(HEIGHT, device=device) + 0.5)[None, None, None]
    height = (y / HORIZON_PX).clamp(0, 1)
    low = (height / 0.5).clamp(0, 1)
    sky = torch.lerp(
        torch.lerp(c["zenith"], c["middle"], low), c["horizon"], ((height - 0.45) / 0.55).clamp(0, 1) ** 1.3
    )

    far = _sample(painted.far_WNCY, row_F, angle_F, 0.5, panorama.FAR_DENSITY)

    def channel(layer: Tensor, index: int) -> Tensor:
        return layer[:, :, index : index + 1]

    bright = sum(channel(far, panorama.SUN + n) * air.sun_glow[:, n] for n in range(3))
    image = sky + (c["sun"] - sky) * bright
    cloud = c["cloud"] * (0.93 + channel(far, panorama.CLOUD_LIGHT))
    image = image + (cloud - image) * (channel(far, panorama.CLOUD) * (0.9 - 0.55 * air.overcast))
    mountain = c["mountain"] * (1 + channel(far, panorama.PEAK_LIGHT))
    mountain = mountain + (c["fog"] - mountain) * (0.9 * air.fog)
    image = image + (mountain - image) * channel(far, panorama.PEAK)
    image = image + (c["fog"] - image) * (0.75 * air.fog * height)

    mid = _sample(painted.mid_WNCY, row_F, angle_F, 0.75, panorama.MID_DENSITY)
    hill = c["hill"] * (1 + channel(mid, panorama.HILL_LIGHT))
    hill = hill + (c["fog"] - hill) * (0.75 * air.fog)
    image = image + (hill - image) * channel(mid, panorama.HILL)

    near = _sample(painted.near_WNCY, row_F, angle_F, 1.0, panorama.NEAR_DENSITY)
    cover, emission = channel(near, panorama.COVER), channel(near, panorama.EMISSION)
    lit = near[:, :, : panorama.COVER] * c["ambient"]
    glass = emission * air.windows
    light = torch.as_tensor(palette.WINDOW_LIGHT, dtype=torch.float32, device=device)[:, None]
    lit = lit * (1 - glass) + light * glass
    water = _water(air, angle_F, time_F, y)
    solid = lit + water * channel(near, panorama.WATER)
    solid = solid + (c["fog"] * cover - solid) * (0.42 * air.fog)
    canvas = torch.zeros(len(angle_F), WIDTH + 2 * _SIDE_PX, 3, HEIGHT, device=device)
    canvas[:, _SIDE_PX : _SIDE_PX + WIDTH] = image * (1 - cover) + solid
    return canvas


def _water(air: _Air, angle_F: Tensor, time_F: Tensor, y: Tensor) -> Tensor:
    """Give the water's colour with a slow swell that stands still on the ring but for its phase; [F, X, 3, Y]."""
    c = air.colours
    depth = ((y - 74) / (HEIGHT - 74)).clamp(0, 1)
    x = (torch.remainder(angle_F, RING_PX).float()[:, None] + torch.arange(WIDTH, device=y.device) + 0.5)[
        ..., None, None
    ]
    turn = 2 * math.pi * x / RING_PX
    beat = torch.remainder(time_F * 2 * math.pi * 0.35, 2 * math.pi).float()[:, None, None, None]
    swell = torch.sin(turn * 11 + y * 0.9 + beat) + torch.sin(turn * -17 + y * 0.55 + 2 * beat)
    return torch.lerp(c["shallow"], c["deep"], depth) * (1 + 0.045 * depth * swell)


def _actors(worlds: WorldSpec, air: _Air, canvas: Tensor, world_F: Tensor, angle_F: Tensor, time_F: Tensor) -> None:
    """Paint the actors over a canvas, in place."""
    kind_of = {name: index for index, name in enumerate(shapes.ACTORS)}
    columns = torch.arange(_ACTOR_COLUMNS, device=canvas.device)
    rows = torch.arange(_ACTOR_ROWS, device=canvas.device)
    flat = canvas.view(-1)
    for actor in range(NUM_ACTORS):
        age = time_F - worlds.actor_enter_s_WA[world_F, actor].double()
        place = worlds.actor_x_WA[world_F, actor] + age.clamp_min(0) * worlds.actor_speed_WA[world_F, actor]
        screen = torch.remainder(place - angle_F + _SIDE_PX, RING_PX) - _SIDE_PX
        seen = (age >= -1e-6) & (screen > -MARGIN_PX) & (screen < WIDTH + MARGIN_PX)
        frame = torch.nonzero(seen & (worlds.actor_kind_WA[world_F, actor] >= 0))[:, 0]
        if len(frame) == 0:
            continue
        world, screen, age = world_F[frame], screen[frame], age[frame]
        kind = worlds.actor_kind_WA[world, actor]
        beat = 2 * math.pi * age + worlds.actor_phase_WA[world, actor].double()
        bob = torch.where(kind == kind_of["cart"], 0.35, torch.where(kind == kind_of["boat"], 0.9, 1.6))
        rate = torch.where(kind == kind_of["cart"], 1.5, torch.where(kind == kind_of["balloon"], 0.2, 0.4))
        base = worlds.actor_base_WA[world, actor] - bob * torch.sin(beat * rate).float()
        first_x, first_y = torch.floor(screen).long() - _ACTOR_COLUMNS // 2, torch.floor(base).long()
        first_y = first_y - (_ACTOR_ROWS - _ACTOR_BELOW)
        x = (first_x[:, None] + columns + 0.5 - screen[:, None]).float()[:, :, None]
        up = (base[:, None] - (first_y[:, None] + rows + 0.5)).float()[:, None, :]
        x = x * worlds.actor_facing_WA[world, actor][:, None, None]
        flap = (kind == kind_of["bird"]) * torch.sin(beat * 1.6).float() * 0.55
        roll = (kind == kind_of["boat"]) * torch.sin(beat * 0.4 + 1).float() * 0.05
        up = up - flap[:, None, None] * (x.abs() - 3).clamp_min(0) - roll[:, None, None] * x
        sprite = paint_sprites(worlds.actor_WAPK[world, actor], x.expand_as(up), up)
        ambient = air.colours["ambient"][frame]
        lit = sprite[:, :, :3] * (ambient + 0.2 * (1 - ambient))  # a little light of their own: told apart by night
        fog = 0.35 * air.fog[frame]
        lit = lit + (air.colours["fog"][frame] * sprite[:, :, 3:4] - lit) * fog
        channels = torch.arange(3, device=canvas.device)
        index = (frame * canvas.shape[1])[:, None] + first_x[:, None] + _SIDE_PX + columns
        index = (index[:, :, None] * 3 + channels)[..., None] * HEIGHT
        index = index + (first_y[:, None] + rows)[:, None, None, :]
        flat[index] = flat[index] * (1 - sprite[:, :, 3:4]) + lit


@functools.cache
def _weather_tile(device: torch.device) -> Tensor:
    """Draw the rain's streaks and the snow's flakes, periodic: [2, X, Y]."""
    generator = torch.Generator().manual_seed(7)
    x, y = torch.arange(_TILE_PX)[:, None] + 0.5, torch.arange(HEIGHT)[None, :] + 0.5
    rain, snow = torch.zeros(_TILE_PX, HEIGHT), torch.zeros(_TILE_PX, HEIGHT)
    for sx, sy, size in torch.rand(20, 3, generator=generator).tolist():
        dx = torch.remainder(x - sx * _TILE_PX + _TILE_PX / 2, _TILE_PX) - _TILE_PX / 2
        dy = torch.remainder(y - sy * HEIGHT + HEIGHT / 2, HEIGHT) - HEIGHT / 2
        along = (1 - (dy / (5 + 3 * size)) ** 2).clamp(0, 1)
        rain = torch.maximum(rain, along * torch.exp(-((dx + 0.25 * dy) ** 2) / 0.7))
        snow = torch.maximum(snow, torch.exp(-((dx**2 + dy**2) / (1.2 + 1.2 * size))))
    return torch.stack([rain, snow]).to(device)


def _precipitation(picture: Tensor, weathers: Tensor, angle_F: Tensor, time_F: Tensor) -> Tensor:
    """Let rain or snow fall over the picture [F, X, 3, Y]."""
    tile = _weather_tile(picture.device)
    columns, rows = torch.arange(WIDTH, device=picture.device), torch.arange(HEIGHT, device=picture.device)
    # name, colour, opacity, fall in px a second
    for layer, weather, colour, opacity, fall in ((0, "rain", 0.88, 0.16, 176.0), (1, "snow", 0.98, 0.5, 16.0)):
        amount = weathers[:, palette.WEATHERS.index(weather)]
        frame = torch.nonzero(amount > 0)[:, 0]
        if len(frame) == 0:
            continue
        drop = torch.remainder(torch.round(time_F[frame] * fall), HEIGHT).long()
        pan = torch.remainder(torch.round(angle_F[frame]), _TILE_PX).long()
        x = torch.remainder(pan[:, None] + columns, _TILE_PX)[:, :, None]
        y = torch.remainder(rows - drop[:, None], HEIGHT)[:, None, :]
        cover = tile[layer][x, y][:, :, None] * (opacity * amount[frame])[:, None, None, None]
        picture[frame] = picture[frame] + (colour - picture[frame]) * cover
    return picture
