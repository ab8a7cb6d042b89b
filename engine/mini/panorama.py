"""What stands still in a world, painted once into ring textures of a few columns a pixel.

A texture is [W, N, C, Y]: column j of a layer with `density` columns a pixel is the picture at ring position
j / density + 0.5, each column already antialiased over one pixel. Shapes: see world.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .world import HEIGHT, HORIZON_PX, RING_PX, ROAD_PX, WorldSpec

FAR_RING_PX, MID_RING_PX = RING_PX // 2, RING_PX * 3 // 4
FAR_DENSITY, MID_DENSITY, NEAR_DENSITY = 2, 4, 2
# Channels of each layer.
CLOUD, CLOUD_LIGHT, PEAK, PEAK_LIGHT, SUN, LOW_SUN, STARS = range(7)
HILL, HILL_LIGHT = range(2)
RED, GREEN, BLUE, COVER, EMISSION, WATER = range(6)

_SPRITE_PX, _SPRITE_ROWS = 72, 68
_LEAST_PX = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Panorama:
    """The textures of a batch of worlds, float32."""

    far_WNCY: Tensor
    mid_WNCY: Tensor
    near_WNCY: Tensor


def paint(spec: WorldSpec) -> Panorama:
    """Paint the worlds' layers, on the device their tensors are on."""
    return Panorama(far_WNCY=_paint_far(spec), mid_WNCY=_paint_mid(spec), near_WNCY=_paint_near(spec))


def _columns(ring_px: int, density: int, like: Tensor) -> Tensor:
    return torch.arange(ring_px * density, device=like.device) / density + 0.5


def _rows(like: Tensor) -> Tensor:
    return torch.arange(HEIGHT, device=like.device) + 0.5


def _around(x: Tensor, ring_px: float) -> Tensor:
    """Give a difference of ring positions its value in [-ring_px / 2, ring_px / 2)."""
    return torch.remainder(x + ring_px / 2, ring_px) - ring_px / 2


def coverage(table_MPK: Tensor, index: int, x_MXY: Tensor, y_MXY: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate one primitive of each of M pictures.

    Args:
        table_MPK: primitives (shapes.py).
        index: which one.
        x_MXY: local coordinates, y up, broadcastable to [M, X, Y].
        y_MXY: likewise.

    Returns:
        Coverage in [0, 1] and light factor, both [M, X, Y].
    """
    k = table_MPK[:, index, :, None, None]
    half_x, half_y = k[:, 15].clamp_min(_LEAST_PX), k[:, 16].clamp_min(_LEAST_PX)  # 0 where a picture has no more
    u, v = (x_MXY - k[:, 13]) / half_x, (y_MXY - k[:, 14]) / half_y
    round_px = (1 - (u * u + v * v + 1e-6).sqrt()) * torch.minimum(half_x, half_y)
    edges = [k[:, 1 + 3 * e] * x_MXY + k[:, 2 + 3 * e] * y_MXY + k[:, 3 + 3 * e] for e in range(4)]
    straight_px = torch.minimum(torch.minimum(edges[0], edges[1]), torch.minimum(edges[2], edges[3]))
    inside = (torch.where(k[:, 0] > 0.5, round_px, straight_px) + 0.5).clamp(0, 1) * k[:, 23]
    light = 1 + k[:, 17] * u.clamp(-1, 1) + k[:, 18] * v.clamp(-1, 1)
    return inside, light


def paint_sprites(table_MPK: Tensor, x_MXY: Tensor, y_MXY: Tensor) -> Tensor:
    """Paint pictures made of primitives.

    Returns:
        [M, X, 5, Y]: colour premultiplied by cover, cover, emission premultiplied.
    """
    shape = torch.broadcast_shapes(x_MXY.shape, y_MXY.shape)
    out = torch.zeros(shape[0], shape[1], 5, shape[2], device=table_MPK.device)
    for index in range(table_MPK.shape[1]):
        inside, light = coverage(table_MPK, index, x_MXY, y_MXY)
        k = table_MPK[:, index]
        source = torch.stack(
            [light * k[:, 19 + c, None, None] for c in range(3)]
            + [torch.ones_like(light), k[:, 22, None, None].expand_as(light)],
            2,
        )
        out = torch.lerp(out, source, inside[:, :, None])
    return out


def _paint_far(spec: WorldSpec) -> Tensor:
    x, y = _columns(FAR_RING_PX, FAR_DENSITY, spec.suns_W3)[:, None], _rows(spec.suns_W3)[None, :]
    grid = torch.zeros(len(spec.seeds_W), x.shape[0], HEIGHT, device=x.device)

    def disc(centre_x: Tensor, centre_y: Tensor | float, radius: float, glow_px: float, glow: float) -> Tensor:
        distance = (_around(x - centre_x, FAR_RING_PX) ** 2 + (y - centre_y) ** 2).sqrt()
        return torch.maximum((radius - distance + 0.5).clamp(0, 1), glow * torch.exp(-distance / glow_px))

    peak, peak_light = grid.clone(), grid.clone()
    for n in range(spec.peaks_WN4.shape[1]):
        px, height, half, light = spec.peaks_WN4[:, n, :, None, None].unbind(1)
        dx = _around(x - px, FAR_RING_PX)
        slope = height / half
        top = HORIZON_PX - height + dx.abs() * slope
        inside = ((y - top) / (1 + slope * slope).sqrt() + 0.5).clamp(0, 1)
        side = (-dx / 1.5).clamp(-1, 1) * 0.16 * light
        snow = ((HORIZON_PX - height * 0.74 - 2.5 * torch.cos(dx * 0.9) - y) / 2 + 0.5).clamp(0, 1)
        snow = snow * ((height - 14) / 4).clamp(0, 1)
        fade = 0.25 * ((y - HORIZON_PX + 22) / 22).clamp(0, 1)
        peak_light = torch.lerp(peak_light, side + 0.55 * snow + fade, inside)
        peak = torch.maximum(peak, inside)
    cloud, cloud_light = grid.clone(), grid.clone()
    for n in range(spec.clouds_WN4.shape[1]):
        cx, cy, rx, ry = spec.clouds_WN4[:, n, :, None, None].unbind(1)
        f = (_around(x - cx, FAR_RING_PX) / rx.clamp_min(0.1)) ** 2 + ((y - cy) / ry.clamp_min(0.1)) ** 2
        inside = ((1 - f) * 1.6).clamp(0, 1) * (rx > 0.5)
        cloud_light = torch.lerp(cloud_light, (-(y - cy) / ry.clamp_min(0.1) * 0.10).expand_as(grid), inside)
        cloud = torch.maximum(cloud, inside * 0.92)
    sun_x = spec.suns_W3[:, :, None, None]
    sun = disc(sun_x[:, 0], 15.0, 5.5, 9.0, 0.55)
    low_sun = disc(sun_x[:, 1], HORIZON_PX - 13, 7.0, 16.0, 0.6)
    moon = disc(sun_x[:, 2], 17.0, 5.0, 7.0, 0.3)
    crescent = (4.6 - ((_around(x - sun_x[:, 2] - 2.4, FAR_RING_PX)) ** 2 + (y - 15.8) ** 2).sqrt() + 0.5).clamp(0, 1)
    stars = moon * (1 - 0.75 * crescent)
    for n in range(spec.stars_WN3.shape[1]):
        sx, sy, bright = spec.stars_WN3[:, n, :, None, None].unbind(1)
        spot = torch.exp(-((_around(x - sx, FAR_RING_PX) ** 2 + (y - sy) ** 2) / 0.9))
        stars = torch.maximum(stars, spot * (0.35 + 0.5 * bright))
    return torch.stack([cloud, cloud_light, peak, peak_light, sun, low_sun, stars], 2)


def _wave(waves_WN2: Tensor, x: Tensor, ring_px: int, first: int) -> Tensor:
    """Sum harmonics `first`, `first` + 1, ... of a ring; returns [W, N, 1]."""
    number = torch.arange(first, first + waves_WN2.shape[1], device=x.device)
    angle = 2 * math.pi * x[None, :, None] * number / ring_px + waves_WN2[:, None, :, 1]
    return (waves_WN2[:, None, :, 0] * torch.sin(angle)).sum(-1, keepdim=True)


def _paint_mid(spec: WorldSpec) -> Tensor:
    x, y = _columns(MID_RING_PX, MID_DENSITY, spec.suns_W3), _rows(spec.suns_W3)
    back = HORIZON_PX - 8 + _wave(spec.waves_W3N2[:, 0], x, MID_RING_PX, 2)
    front = HORIZON_PX - 3 + 0.8 * _wave(spec.waves_W3N2[:, 0].flip(1), x, MID_RING_PX, 3)
    cover = (y - back + 0.5).clamp(0, 1)
    light = 0.20 - 0.016 * (y - back)
    light = torch.lerp(light, 0.02 - 0.02 * (y - front), (y - front + 0.5).clamp(0, 1))
    return torch.stack([cover, light], 2)


def _paint_near(spec: WorldSpec) -> Tensor:
    x, y = _columns(RING_PX, NEAR_DENSITY, spec.suns_W3), _rows(spec.suns_W3)
    ground = HORIZON_PX + 1.5 + _wave(spec.waves_W3N2[:, 1], x, RING_PX, 2)
    shore = 77.5 + _wave(spec.waves_W3N2[:, 2], x, RING_PX, 2)
    land = (y - ground + 0.5).clamp(0, 1)
    grass, sand = spec.colours_W33[:, 0, None, None], spec.colours_W33[:, 1, None, None]  # [W, 1, 1, 3]
    depth = ((y - ground) / 16).clamp(0, 1)[..., None]
    colour = grass * (1.06 - 0.22 * depth)
    road = (1.8 - (y - ROAD_PX).abs() + 0.5).clamp(0, 1)[:, None] * 0.55
    colour = torch.lerp(colour, sand.expand_as(colour), road)
    beach = ((y - shore + 2.8) / 1.6 + 0.5).clamp(0, 1)[..., None]
    colour = torch.lerp(colour, (sand * 1.04).expand_as(colour), beach)
    near = torch.zeros(*land.shape[:2], 6, HEIGHT, device=x.device)
    near[:, :, :3] = (colour * land[..., None]).transpose(2, 3)
    near[:, :, COVER] = land
    _paste_landmarks(spec, near)

    wet = (y - shore + 0.5).clamp(0, 1)[:, :, None]
    mirror = (shore - 2.1 * (y - shore) - 1.0).clamp(0, HEIGHT - 1)
    reflected = near[:, :, :4].gather(3, mirror.long()[:, :, None].expand(-1, -1, 4, -1))
    strength = 0.42 * (1 - (y - shore) / 26).clamp(0, 1)[:, :, None]
    near[:, :, :4] = torch.lerp(near[:, :, :4], reflected * strength, wet)
    near[:, :, EMISSION] *= 1 - wet[:, :, 0]
    near[:, :, WATER] = wet[:, :, 0] * (1 - reflected[:, :, 3] * strength[:, :, 0])
    near[:, :, COVER] = near[:, :, COVER] + near[:, :, WATER]
    return near


def _paste_landmarks(spec: WorldSpec, near_WNCY: Tensor) -> None:
    """Paint the landmarks over the near layer, the furthest first, in place."""
    worlds = torch.arange(len(spec.seeds_W), device=near_WNCY.device)[:, None]
    hidden = torch.where(spec.landmark_kind_WL < 0, 1e3, 0.0)
    order = torch.argsort(spec.landmark_base_WL + hidden, dim=1, stable=True)
    count = _SPRITE_PX * NEAR_DENSITY
    offsets = torch.arange(count, device=near_WNCY.device)
    rows = torch.arange(_SPRITE_ROWS, device=near_WNCY.device) + 0.5
    for place in range(order.shape[1]):
        which = order[:, place : place + 1]
        centre = spec.landmark_x_WL.gather(1, which)
        base = spec.landmark_base_WL.gather(1, which).round()
        first = (centre * NEAR_DENSITY).round().long() - count // 2
        x = (first + offsets) / NEAR_DENSITY + 0.5 - centre
        up = (_SPRITE_ROWS - 3.0) - rows
        shadow = torch.exp(-((x / 15) ** 2))[:, :, None] * torch.exp(-((up + 0.8) ** 2) / 2.5)[None, None]
        sprite = paint_sprites(spec.landmark_WLPK[worlds[:, 0], which[:, 0]], x[:, :, None], up[None, None])
        top = (base - (_SPRITE_ROWS - 3.0)).long()[:, :, None]
        columns = torch.remainder(first + offsets, near_WNCY.shape[1])[:, :, None]
        lines = top + torch.arange(_SPRITE_ROWS, device=near_WNCY.device)[None, None]
        visible = (spec.landmark_kind_WL.gather(1, which) >= 0)[:, :, None]
        index = (worlds[:, :, None], columns, slice(None), lines)
        old = near_WNCY[index]  # advanced indices first: [W, X, Y, 6]
        new = (sprite * visible[:, :, None]).transpose(2, 3)
        old[..., :3] *= 1 - 0.25 * (shadow * visible)[..., None]
        old[..., :5] = old[..., :5] * (1 - new[..., 3:4]) + new
        near_WNCY[index] = old
