"""Triton twins of transform.py: encode (measure, plan, quantise), and materialise with RoPE.

Encode reads a block twice: measure sums the squares of coefficients over tiles, plan (one program a head, small numbers
only) writes means, exponents and the plan, quantise writes gains and codes. Sums stand in another order than the
reference's: exponents, gains and codes that lie at a border may differ, so payloads of CPU and GPU differ in bytes, not
in quality; what is written is read alike by both. The same input gives the same bytes. Products are three of TF32's:
with one, what large coefficients lose drowns the small ones of very smooth channels, and with them a tile's gain.

What says where a code lies and what it is worth (depth, start, step of each coefficient) is the same for all tiles of a
head's block: a program of materialise works it out once, for the few tiles it then walks over. A tile's coefficients go
through one matrix product in float16: 2^-11 of the larger coefficients, where 4 bits leave 2^-4.

Shape legend: T tokens of a block, H heads, D head dim, K tiles, F tokens of a tile and as many frequencies, FP = F
rounded up to a power of two, G groups of TILES tiles.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.lt2_triton import channel_mean, short_float
from longtake.kernels.rotary import Rotary
from longtake.kernels.rotary_triton import turns
from longtake.kernels.scaling import Scaling
from longtake.kernels.scaling_triton import emit, token_alignment
from longtake.kernels.transform import MOST_DEPTH, depth_table, steps
from longtake.kernels.transform import MOST_FALL as _MOST_FALL
from longtake.kernels.transform import MOST_ROW as _MOST_ROW

if TYPE_CHECKING:
    from longtake.kernels.transform import TransformCodec

MEASURE_TILES = 6
ENCODE_WARPS = 8
TINY = tl.constexpr(1e-20)
MOST_FALL = tl.constexpr(_MOST_FALL)
MOST_ROW = tl.constexpr(_MOST_ROW)
EXPONENTS = tl.constexpr(_MOST_FALL + _MOST_ROW + 1)
PAIRS = tl.constexpr(EXPONENTS.value * MOST_DEPTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class TileLaunch:
    """How materialise is cut into programs.

    Args:
        tiles: that a program walks over.
        warps: of a program.
    """

    tiles: int = 13
    warps: int = 8


DEFAULT_LAUNCH = TileLaunch()


@triton.jit
def tile_rows(
    tile, token_F,
    TT: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Where in its block each token of a tile stands; tiles and their tokens in the order frame, row, column."""
    across: tl.constexpr = WIDTH // TX
    down: tl.constexpr = HEIGHT // TY
    frame = tile // (across * down) * TT + token_F // (TY * TX)
    row = tile // across % down * TY + token_F // TX % TY
    return (frame * HEIGHT + row) * WIDTH + tile % across * TX + token_F % TX


@triton.jit
def load_tile(
    x, tile, stride_t, D: tl.constexpr, F: tl.constexpr, FP: tl.constexpr,
    TT: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile's tokens of one head, float32 [FP, D]."""
    token = tl.arange(0, FP)
    row = tile_rows(tile, token, TT, TY, TX, HEIGHT, WIDTH)
    place = x + row.to(tl.int64)[:, None] * stride_t + tl.arange(0, D)[None, :]
    return tl.load(place, mask=(token < F)[:, None], other=0.0).to(tl.float32)


@triton.jit
def load_cosines(cosines, F: tl.constexpr, FP: tl.constexpr):
    """The transform, float32 [FP frequencies, FP tokens], 0 beyond F."""
    one = tl.arange(0, FP)
    inside = (one < F)[:, None] & (one < F)[None, :]
    return tl.load(cosines + one[:, None] * F + one[None, :], mask=inside, other=0.0)


@triton.jit
def depth_of(exponent_FD, table, num_pairs):
    """Bits of coefficients once so many pairs have theirs, int32."""
    return tl.load(table + tl.minimum(tl.maximum(num_pairs, 0), PAIRS) * EXPONENTS + exponent_FD).to(tl.int32)


@triton.jit
def load_exponents(
    section, D: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr
):
    """Exponent of each coefficient, int32 [FP, D], in 0 .. 46 whatever the section's bytes are."""
    frequency, channel = tl.arange(0, FP), tl.arange(0, D)
    fall = tl.load((section + CHANNELS).to(tl.pointer_type(tl.int16)) + channel).to(tl.int32) & 15
    row = tl.load(section + ROWS + frequency, mask=frequency < F, other=0).to(tl.int32)
    return tl.minimum(row, MOST_ROW)[:, None] + fall[None, :]


@triton.jit
def load_depths(
    section, table, exponent_FD, D: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, TILE_BYTES: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Of each coefficient: bits, and the bit of a tile's stream at which its code begins, int32 [FP, D].

    Whatever the section's bytes are, no code begins beyond the stream's end.
    """
    frequency, channel = tl.arange(0, FP), tl.arange(0, D)
    plan = (section + PLAN).to(tl.pointer_type(tl.int32))
    one_more = frequency[:, None] * D + channel[None, :] < tl.load(plan + 1)
    depth = depth_of(exponent_FD, table, tl.load(plan) + one_more.to(tl.int32))
    depth = tl.where((frequency < F)[:, None], depth, 0)
    of_row = tl.sum(depth, 1)
    start = tl.cumsum(depth, 1) - depth + (tl.cumsum(of_row, 0) - of_row)[:, None]
    return depth, tl.minimum(start, 8 * TILE_BYTES)


@triton.jit
def measure_kernel(
    x, cosines, averages, energies, stride_t, stride_h,
    D: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
    TT: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Averages [H, K, D] of TILES tiles of one head, and the sum over them of squared coefficients [H, G, FP, D].

    A tile's own average is taken away first, so the first frequency's sum is 0 and left to the plan.
    """
    group, head = tl.program_id(0), tl.program_id(1)
    frequency, channel = tl.arange(0, FP), tl.arange(0, D)
    cosine = load_cosines(cosines, F, FP)
    energy = tl.zeros((FP, D), tl.float32)
    for tile in range(group * TILES, min(group * TILES + TILES, K)):
        rest = load_tile(x + head * stride_h, tile, stride_t, D, F, FP, TT, TY, TX, HEIGHT, WIDTH)
        average = tl.sum(rest, 0) / F
        tl.store(averages + (head * K + tile) * D + channel, average)
        rest = tl.where((frequency < F)[:, None], rest - average[None, :], 0.0)
        y = tl.dot(cosine, rest, input_precision="tf32x3")
        energy += y * y
    place = energies + (head * tl.num_programs(0) + group) * (FP * D) + frequency[:, None] * D + channel[None, :]
    tl.store(place, energy)


@triton.jit
def exponent_of(share, MOST: tl.constexpr):
    """How often a share in 0 .. 1 halves its square: int32 of 0 .. MOST."""
    exponent = tl.floor(-2 * tl.math.log2(tl.maximum(share, TINY)) + 0.5)
    return tl.minimum(tl.maximum(exponent, 0.0), MOST * 1.0).to(tl.int32)


@triton.jit
def plan_kernel(
    averages, energies, table, out, stride_page,
    D: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr,
    TILE_BYTES: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Channels, rows, unit and plan of one head, from what was measured."""
    head = tl.program_id(0)
    section = out + head.to(tl.int64) * stride_page
    frequency, channel = tl.arange(0, FP), tl.arange(0, D)
    real = (frequency < F)[:, None]
    total, flat = tl.zeros((CHUNK, D), tl.float32), tl.zeros((CHUNK, D), tl.float32)
    for first in range(0, K, CHUNK):
        tile = first + tl.arange(0, CHUNK)[:, None]
        total += tl.load(averages + (head * K + tile) * D + channel[None, :], mask=tile < K, other=0.0)
    bits = short_float(tl.sum(total, 0) / K)
    for first in range(0, K, CHUNK):
        tile = first + tl.arange(0, CHUNK)[:, None]
        average = tl.load(averages + (head * K + tile) * D + channel[None, :], mask=tile < K, other=0.0)
        apart = tl.where(tile < K, average - channel_mean(bits)[None, :], 0.0)
        flat += apart * apart
    energy = tl.zeros((FP, D), tl.float32)
    for group in range(GROUPS):
        place = energies + (head * GROUPS + group) * (FP * D) + frequency[:, None] * D + channel[None, :]
        energy += tl.load(place)
    energy = tl.where(frequency[:, None] == 0, F * tl.sum(flat, 0)[None, :], energy)

    spread = tl.sqrt(tl.sum(energy, 0) / (K * F))
    fall = exponent_of(spread / tl.maximum(tl.max(spread, 0), TINY), MOST_FALL)
    height = tl.sqrt(tl.sum(energy * tl.math.exp2(fall.to(tl.float32))[None, :], 1) / (K * D))
    unit = tl.max(height, 0)
    row = exponent_of(height / tl.maximum(unit, TINY), MOST_ROW)
    exponent = row[:, None] + fall[None, :]
    whole = 0
    for power in tl.static_range(9):  # the most pairs whose bits fit, found by halving
        more = whole + (256 >> power)
        spent = tl.sum(tl.sum(tl.where(real, depth_of(exponent, table, more), 0), 1), 0)
        whole = tl.where((more <= PAIRS) & (spent <= 8 * TILE_BYTES), more, whole)
    depth = depth_of(exponent, table, whole)
    left = 8 * TILE_BYTES - tl.sum(tl.sum(tl.where(real, depth, 0), 1), 0)
    following = (real & (depth_of(exponent, table, whole + 1) > depth)).to(tl.int32)
    of_row = tl.sum(following, 1)
    met = tl.cumsum(following, 1) + (tl.cumsum(of_row, 0) - of_row)[:, None]
    before = tl.sum(tl.sum((real & (met <= left)).to(tl.int32), 1), 0)

    tl.store((section + CHANNELS).to(tl.pointer_type(tl.int16)) + channel, (bits | fall).to(tl.int16))
    tl.store(section + ROWS + frequency, row.to(tl.uint8), mask=frequency < F)
    tl.store((section + UNIT).to(tl.pointer_type(tl.float32)), unit)
    tl.store((section + PLAN).to(tl.pointer_type(tl.int32)), whole)
    tl.store((section + PLAN).to(tl.pointer_type(tl.int32)) + 1, before)


@triton.jit
def reciprocal(x):
    """1 / x, 0 where x is 0."""
    return tl.where(x > 0, 1.0 / tl.where(x > 0, x, 1.0), 0.0)


@triton.jit
def quantise_kernel(
    x, cosines, table, steps, out, stride_t, stride_h, stride_page,
    D: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, TILE_BYTES: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, GAINS: tl.constexpr, UNIT: tl.constexpr, PLAN: tl.constexpr,
    TT: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gain and codes of one tile of one head; codes are or-ed into zeros, for a word may be two tiles'."""
    tile, head = tl.program_id(0), tl.program_id(1)
    section = out + head.to(tl.int64) * stride_page
    frequency, channel = tl.arange(0, FP), tl.arange(0, D)
    mean = channel_mean(tl.load((section + CHANNELS).to(tl.pointer_type(tl.int16)) + channel).to(tl.int32))
    unit = tl.load((section + UNIT).to(tl.pointer_type(tl.float32)))
    exponent = load_exponents(section, D, F, FP, CHANNELS, ROWS)
    rest = load_tile(x + head * stride_h, tile, stride_t, D, F, FP, TT, TY, TX, HEIGHT, WIDTH)
    rest = tl.where((frequency < F)[:, None], rest - mean[None, :], 0.0)
    y = tl.dot(load_cosines(cosines, F, FP), rest, input_precision="tf32x3")
    y = y * reciprocal(unit) * tl.math.exp2(0.5 * exponent.to(tl.float32))
    square = tl.sum(tl.sum(y * y, 1), 0)
    gain = tl.minimum(tl.sqrt(square / (F * D)), 448.0).to(tl.float8e4nv)
    tl.store((section + GAINS).to(tl.pointer_type(tl.float8e4nv)) + tile, gain)

    depth, start = load_depths(section, table, exponent, D, F, FP, TILE_BYTES, PLAN)
    levels = 1 << depth
    level = tl.floor(y * reciprocal(tl.load(steps + depth) * gain.to(tl.float32)) + 0.5 * levels.to(tl.float32))
    code = tl.minimum(tl.maximum(level, 0.0), levels.to(tl.float32) - 1).to(tl.int32)

    # four neighbours' codes, 24 bits at most, are one number; its bits lie in one word or two
    quad = tl.min(tl.reshape(start, (FP, D // 4, 4)), 2)
    offset = tl.reshape(start, (FP, D // 4, 4)) - quad[:, :, None]
    value = tl.sum(tl.reshape(code, (FP, D // 4, 4)) << offset, 2)
    place = tile * (8 * TILE_BYTES) + quad
    words, shift = section.to(tl.pointer_type(tl.int32)) + (place >> 5), place & 31
    low, high = value << shift, (value >> 1) >> (31 - shift)
    tl.atomic_or(words, low, mask=low != 0, sem="relaxed")
    tl.atomic_or(words + 1, high, mask=high != 0, sem="relaxed")


@triton.jit
def materialise_kernel(
    pages, slots, temporal, spatial, cosines, table, steps, out, centre, scale,
    stride_slot, stride_page, stride_oh, stride_ox, stride_od, tokens, tokens_per_frame,
    D: tl.constexpr, PT: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, K: tl.constexpr, TILE_BYTES: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, GAINS: tl.constexpr, UNIT: tl.constexpr, PLAN: tl.constexpr,
    TT: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    SCALED: tl.constexpr, TURNED: tl.constexpr, TILES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Unpack TILES tiles of one block and head; turn their tokens unless PT is 0."""
    block, head = tl.program_id(1), tl.program_id(2)
    section = pages + tl.load(slots + block).to(tl.int64) * stride_slot + head * stride_page
    channel, token = tl.arange(0, D), tl.arange(0, FP)
    mean = channel_mean(tl.load((section + CHANNELS).to(tl.pointer_type(tl.int16)) + channel).to(tl.int32))
    unit = tl.load((section + UNIT).to(tl.pointer_type(tl.float32)))
    exponent = load_exponents(section, D, F, FP, CHANNELS, ROWS)
    depth, start = load_depths(section, table, exponent, D, F, FP, TILE_BYTES, PLAN)
    # a code stays where it stands in its two bytes: code * 2^shift is masked out of them, and 2^-shift is in the step
    mask = ((1 << depth) - 1) << (start & 7)
    step = tl.load(steps + depth) * tl.math.exp2(-0.5 * exponent.to(tl.float32) - (start & 7).to(tl.float32))
    lowest = -0.5 * mask.to(tl.float32) * step
    place = mask | (start >> 3 << 16)
    inverse = tl.trans(load_cosines(cosines, F, FP)).to(tl.float16)
    live = token < F
    first = tl.program_id(0) * TILES
    for tile in tl.range(first, min(first + TILES, K), disable_licm=True):
        stream = section + tile * TILE_BYTES + (place >> 16)
        window = tl.load(stream).to(tl.int32) | (tl.load(stream + 1).to(tl.int32) << 8)
        y = (window & place).to(tl.float32) * step + lowest
        gain = tl.load((section + GAINS).to(tl.pointer_type(tl.float8e4nv)) + tile).to(tl.float32)
        rows = tl.dot(inverse, y.to(tl.float16)) * (gain * unit) + mean[None, :]
        row = tile_rows(tile, token, TT, TY, TX, HEIGHT, WIDTH)
        if PT:
            frame = block * (tokens // tokens_per_frame) + row // tokens_per_frame
            cos, sin = turns(temporal, spatial, frame, row % tokens_per_frame, live, D, PT, FP)
            real, imag = tl.split(tl.reshape(rows, (FP, D // 2, 2)))
            rows = tl.reshape(tl.join(real * cos - imag * sin, real * sin + imag * cos), (FP, D))
        target = block.to(tl.int64) * (tokens // ALIGN * ALIGN) + row  # the same number, seen to be aligned
        emit(rows, out, head, target, live, stride_oh, stride_ox, stride_od, centre, scale, D, SCALED, TURNED)


def tiling(codec: TransformCodec) -> dict[str, int]:
    """Sizes of the codec's tiles, as its kernels take them."""
    tt, ty, tx = codec.tile
    _, height, width = codec.extent
    padded = max(16, triton.next_power_of_2(codec.tile_tokens))
    return {"D": codec.geometry.head_dim, "F": codec.tile_tokens, "FP": padded, "TT": tt, "TY": ty, "TX": tx,
            "HEIGHT": height, "WIDTH": width}  # fmt: skip


def places(codec: TransformCodec) -> dict[str, int]:
    """Bytes of a tile and places of fields in a section, as its kernels take them."""
    names = ("channels", "rows", "gains", "unit", "plan")
    return {"TILE_BYTES": codec.tile_bytes} | {name.upper(): codec.layout.offset(name) for name in names}


def planning(codec: TransformCodec) -> dict[str, int]:
    """What `plan_kernel` takes."""
    groups, chunk = triton.cdiv(codec.num_tiles, MEASURE_TILES), min(64, triton.next_power_of_2(codec.num_tiles))
    known = tiling(codec) | places(codec) | {"K": codec.num_tiles, "GROUPS": groups, "CHUNK": chunk}
    return {name: known[name] for name in plan_kernel.arg_names if name in known}


def encode(x_THD: Tensor, out_HB: Tensor, codec: TransformCodec) -> None:
    """Encode [T, H, D] (D 64 or 128, last dim contiguous or copied) into sections of a page."""
    x_THD = x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()
    fit(x_THD, out_HB, codec)
    quantise(x_THD, out_HB, codec)


def fit(x_THD: Tensor, out_HB: Tensor, codec: TransformCodec) -> None:
    """Write channels, rows, unit and plan of each head."""
    num_heads, num_tiles, sizes = x_THD.shape[1], codec.num_tiles, tiling(codec)
    planned = planning(codec)
    groups = planned["GROUPS"]
    averages_HKD = torch.empty((num_heads, num_tiles, sizes["D"]), dtype=torch.float32, device=x_THD.device)
    energies_HGFD = torch.empty((num_heads, groups, sizes["FP"], sizes["D"]), dtype=torch.float32, device=x_THD.device)
    measure_kernel[(groups, num_heads)](
        x_THD, codec.cosines(x_THD.device), averages_HKD, energies_HGFD, x_THD.stride(0), x_THD.stride(1),
        K=num_tiles, TILES=MEASURE_TILES, num_warps=ENCODE_WARPS, **sizes,
    )  # fmt: skip
    plan_kernel[(num_heads,)](
        averages_HKD, energies_HGFD, depth_table(x_THD.device), out_HB, out_HB.stride(0),
        num_warps=ENCODE_WARPS, **planned,
    )  # fmt: skip


def quantise(x_THD: Tensor, out_HB: Tensor, codec: TransformCodec) -> None:
    """Write gains and codes of each head, given what `fit` wrote."""
    out_HB[:, : codec.layout.offset("channels")].zero_()
    quantise_kernel[(codec.num_tiles, x_THD.shape[1])](
        x_THD, codec.cosines(x_THD.device), depth_table(x_THD.device), steps(x_THD.device), out_HB,
        x_THD.stride(0), x_THD.stride(1), out_HB.stride(0), num_warps=ENCODE_WARPS,
        **tiling(codec), **places(codec),
    )  # fmt: skip


def materialise(
    sections_GHB: Tensor,
    slots_N: Tensor,
    rotary: Rotary | None,
    out_HXD: Tensor,
    codec: TransformCodec,
    scaling: Scaling | None = None,
    launch: TileLaunch = DEFAULT_LAUNCH,
) -> None:
    """Unpack the slots' sections into N*T rows of each head, turned if tables are given, scaled for e4m3."""
    device, num_tiles = out_HXD.device, codec.num_tiles
    temporal, spatial, per_frame, pairs = sections_GHB, sections_GHB, 1, 0
    centre, scale = (slots_N, slots_N) if scaling is None else (scaling.centre_HD, scaling.scale_H)
    if rotary is not None:
        temporal, spatial = rotary.temporal_YP2, rotary.spatial_SQ2
        per_frame, pairs = rotary.tokens_per_frame, temporal.shape[1]
    materialise_kernel[triton.cdiv(num_tiles, launch.tiles), slots_N.shape[0], out_HXD.shape[0]](
        sections_GHB, slots_N, temporal, spatial, codec.cosines(device), depth_table(device), steps(device), out_HXD,
        centre, scale, sections_GHB.stride(0), sections_GHB.stride(1), out_HXD.stride(0), out_HXD.stride(1),
        out_HXD.stride(2), codec.geometry.num_tokens, per_frame,
        PT=pairs, K=num_tiles, SCALED=scaling is not None, TURNED=out_HXD.stride(2) != 1, TILES=launch.tiles,
        ALIGN=token_alignment(codec.geometry.num_tokens), num_warps=launch.warps, **tiling(codec), **places(codec),
    )  # fmt: skip
