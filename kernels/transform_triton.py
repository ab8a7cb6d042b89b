"""Triton twin of the transform codec's decoder: materialise with RoPE; and what the encoder's kernels share with it.

What says where a code lies and what it is worth (depth, start, step of each coefficient) is the same for all tiles of a
head's block: a program works it out once, for the tiles it then walks over. Codes are read in quads, four neighbouring
channels of a frequency: at most 28 bits, cut out of two words; a code is worth something where it stands, so it is only
masked. What a frequency and a channel are worth is left to the inverse transform's two sides, so that a coefficient is
of order 1 in float16 whatever its exponent. One matrix product in float16 a tile: 2^-11 of the larger coefficients,
where 4 bits leave 2^-4.

Programs take half the channels: two of them fit on a processor at a time, and one works while the other waits.

Shape legend: T tokens of a block, H heads, D head dim, C channels of a program, Q quads of channels, K tiles, F tokens
of a tile and as many frequencies, FP = 64 tokens or frequencies of a product, 0 beyond F.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.arena_triton import reading
from longtake.kernels.rotary import Rotary
from longtake.kernels.rotary_triton import turns
from longtake.kernels.scaling import Scaling
from longtake.kernels.scaling_triton import put
from longtake.kernels.transform import MOST_FALL as _MOST_FALL
from longtake.kernels.transform import MOST_ROW as _MOST_ROW
from longtake.kernels.transform import MOST_TILE_TOKENS, depth_table, steps

if TYPE_CHECKING:
    from longtake.kernels.transform import TransformCodec

MOST_FALL = tl.constexpr(_MOST_FALL)
MOST_ROW = tl.constexpr(_MOST_ROW)
EXPONENTS = tl.constexpr(_MOST_FALL + _MOST_ROW + 1)
STAGES = 1  # words are loaded ahead into registers: on Triton's way, through shared memory, 16 lanes meet in one bank


@dataclass(frozen=True, slots=True, kw_only=True)
class TileLaunch:
    """How materialise is cut into programs.

    Args:
        tiles: that a program walks over.
        channels: of a program, at most: 64 or 128.
        warps: of a program.
        registers: of a thread, at most; None: as many as it takes.
    """

    tiles: int = 26
    channels: int = 64
    warps: int = 8
    registers: int | None = 128  # two programs of 8 warps at a time; four registers are put aside for it


# An H200, keys and values of 28 blocks of 4,680 tokens x 12 heads x 128: into BF16 0.348 and 0.258 ms with the first
# launch, 0.378 and 0.258 with the second; into FP8 0.451 and 0.255, 0.400 and 0.237.
DEFAULT_LAUNCH = TileLaunch()
FP8_LAUNCH = TileLaunch(warps=4, registers=None)


def default_launch(*, scaled: bool, turned: bool) -> TileLaunch:
    """The faster launch into FP8 (`scaled`) or wider rows; `turned`: with tokens contiguous, which has no figures."""
    return FP8_LAUNCH if scaled and not turned else DEFAULT_LAUNCH


@triton.jit
def channel_mean(word):
    """Mean in a channel's 16 bits (as int32), float32."""
    return (word & 0xFFF0).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def tile_rows(
    tile, token_F,
    TT: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Where in its block each token of a tile stands; tiles and their tokens in the order frame, row, column."""
    across: tl.constexpr = WIDTH // TX
    down: tl.constexpr = HEIGHT // TY
    corner = (tile // (across * down) * (TT * HEIGHT) + tile // across % down * TY) * WIDTH + tile % across * TX
    return corner + (token_F // (TY * TX) * HEIGHT + token_F // TX % TY) * WIDTH + token_F % TX


@triton.jit
def load_cosines(cosines, F: tl.constexpr, FP: tl.constexpr, COLUMNS: tl.constexpr):
    """The transform, float32 [FP frequencies, COLUMNS tokens], 0 beyond F; tokens again from FP on."""
    row, column = tl.arange(0, FP), tl.arange(0, COLUMNS) % FP
    inside = (row < F)[:, None] & (column < F)[None, :]
    return tl.load(cosines + row[:, None] * F + column[None, :], mask=inside, other=0.0)


@triton.jit
def before_each(count_QF, of_row_F):
    """Sum of what stands before each quad, in its row and in the rows before, whose sums are given: int32 [Q, FP]."""
    return tl.cumsum(count_QF, 0) - count_QF + (tl.cumsum(of_row_F, 0) - of_row_F)[None, :]


@triton.jit
def quad_exponents(header, i, first, F: tl.constexpr, FP: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr):
    """Exponents of channels first + 4q + i, int32 [Q, FP], in 0 .. 46 whatever the section's bytes are.

    Quads stand in the first dimension: Triton deals that to the lanes of a warp where addresses say nothing better, and
    the codes of a frequency's quads are neighbours.
    """
    channel, frequency = first + 4 * tl.arange(0, Q)[:, None] + i, tl.arange(0, FP)[None, :]
    fall = tl.load(header.to(tl.pointer_type(tl.int16)) + channel).to(tl.int32) & 15
    row = tl.load(header + ROWS + frequency, mask=frequency < F, other=0).to(tl.int32)
    return tl.minimum(row, MOST_ROW) + fall


@triton.jit
def quad_depths(
    header, table, i, first, whole, before,
    D: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Bits of channels first + 4q + i, int32 [Q, FP], in 0 .. DEPTH."""
    channel, frequency = first + 4 * tl.arange(0, Q)[:, None] + i, tl.arange(0, FP)[None, :]
    num_pairs = whole + (frequency * D + channel < before).to(tl.int32)
    num_pairs = tl.minimum(tl.maximum(num_pairs, 0), EXPONENTS * DEPTH)
    place = num_pairs * EXPONENTS + quad_exponents(header, i, first, F, FP, ROWS, Q)
    return tl.where(frequency < F, tl.load(table + place).to(tl.int32), 0)


@triton.jit
def part(depth, offset, steps):
    """Where a code stands in its quad's bits, and half of what a step is worth there."""
    mask = ((1 << depth) - 1) << offset
    return mask, tl.load(steps + depth) * tl.math.exp2(-1.0 - offset.to(tl.float32))


@triton.jit
def worth(window, mask, step):
    """The coefficient whose code the mask cuts out: (code - middle) * step, float32 [FP, Q]."""
    return tl.trans((2 * (window & mask) - mask).to(tl.float32) * step)


@triton.jit
def load_words(section, place):
    """The word in which a bit lies, and the next."""
    words = section.to(tl.pointer_type(tl.uint32)) + (place >> 5)
    return tl.load(words), tl.load(words + 1)


@triton.jit
def materialise_kernel(
    pages, slots, temporal, spatial, out, centre, scale,
    stride_slot, stride_page, stride_oh, stride_ox, stride_od, tokens, tokens_per_frame: tl.constexpr,
    cosines, table, steps,
    D: tl.constexpr, PT: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, K: tl.constexpr, TILE_BYTES: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, GAINS: tl.constexpr, UNIT: tl.constexpr, PLAN: tl.constexpr,
    TT: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    SCALED: tl.constexpr, TURNED: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Unpack C channels, all or half, of TILES tiles of one block and head; turn their tokens unless PT is 0."""
    block, head = tl.program_id(1), tl.program_id(2) // (D // C)
    first = tl.program_id(2) % (D // C) * C
    section = pages + tl.load(slots + block).to(tl.int64) * stride_slot + head * stride_page
    header = section + CHANNELS
    channel, token = first + tl.arange(0, C), tl.arange(0, FP)
    word = tl.load(header.to(tl.pointer_type(tl.int16)) + channel).to(tl.int32)
    mean, factor = channel_mean(word), tl.math.exp2(-0.5 * (word & 15).to(tl.float32))
    factor *= tl.load((header + UNIT).to(tl.pointer_type(tl.float32)))
    if SCALED:
        inverse_scale = 1.0 / tl.load(scale + head)
        mean, factor = mean * inverse_scale, factor * inverse_scale

    plan = (header + PLAN).to(tl.pointer_type(tl.int32))
    whole, before = tl.load(plan), tl.load(plan + 1)
    d0 = quad_depths(header, table, 0, first, whole, before, D, F, FP, DEPTH, ROWS, C // 4)
    d1 = quad_depths(header, table, 1, first, whole, before, D, F, FP, DEPTH, ROWS, C // 4)
    d2 = quad_depths(header, table, 2, first, whole, before, D, F, FP, DEPTH, ROWS, C // 4)
    d3 = quad_depths(header, table, 3, first, whole, before, D, F, FP, DEPTH, ROWS, C // 4)
    own = d0 + d1 + d2 + d3
    sums = tl.sum(own, 0)
    start = tl.zeros_like(own)
    if C < D:  # the other half of the channels
        other = tl.zeros_like(own)
        for i in tl.static_range(4):
            other += quad_depths(header, table, i, C - first, whole, before, D, F, FP, DEPTH, ROWS, C // 4)
        start += tl.where(first > 0, tl.sum(other, 0), 0)[None, :]
        sums += tl.sum(other, 0)
    # whatever the section's bytes are, no code begins beyond the stream's end
    start = tl.minimum(start + before_each(own, sums), 8 * TILE_BYTES)
    m0, s0 = part(d0, tl.zeros_like(d0), steps)
    m1, s1 = part(d1, d0, steps)
    m2, s2 = part(d2, d0 + d1, steps)
    m3, s3 = part(d3, d0 + d1 + d2, steps)

    of_row = tl.minimum(tl.load(header + ROWS + token, mask=token < F, other=0).to(tl.float32), MOST_ROW * 1.0)
    inverse = load_cosines(cosines, F, FP, FP) * tl.math.exp2(-0.5 * of_row)[:, None]
    inverse = tl.trans(inverse.to(tl.float16))
    live = token < F
    begin = tl.program_id(0) * TILES
    low, high = load_words(section, begin * (8 * TILE_BYTES) + start)
    for tile in tl.range(begin, min(begin + TILES, K), disable_licm=True):
        shift = (tile * (8 * TILE_BYTES) + start) & 31
        window = ((low.to(tl.uint64) | (high.to(tl.uint64) << 32)) >> shift.to(tl.uint64)).to(tl.int32)
        low, high = load_words(section, min(tile + 1, K - 1) * (8 * TILE_BYTES) + start)  # the next tile's, ahead
        even = tl.join(worth(window, m0, s0), worth(window, m2, s2))
        odd = tl.join(worth(window, m1, s1), worth(window, m3, s3))
        # rounded last: Triton 3.7 fails where a reshape leads straight into a product
        y = tl.reshape(tl.join(even, odd), (FP, C)).to(tl.float16)
        gain = tl.load((header + GAINS).to(tl.pointer_type(tl.float8e4nv)) + tile).to(tl.float32)
        rows = tl.dot(inverse, y) * (factor * gain)[None, :] + mean[None, :]
        row = tile_rows(tile, token, TT, TY, TX, HEIGHT, WIDTH)
        if PT:
            frame = block * (tokens // tokens_per_frame) + row // tokens_per_frame
            cos, sin = turns(temporal, spatial, frame, row % tokens_per_frame, live, D, PT, FP, first, C)
            real, imag = tl.split(tl.reshape(rows, (FP, C // 2, 2)))
            rows = tl.reshape(tl.join(real * cos - imag * sin, real * sin + imag * cos), (FP, C))
        if SCALED:
            middle = tl.load(centre + head * D + channel) * inverse_scale  # again each time: registers are dearer
            rows = tl.clamp(rows - middle[None, :], -448.0, 448.0)
        target = block.to(tl.int64) * (tokens // ALIGN * ALIGN) + row  # the same number, seen to be aligned
        put(rows, out + first * stride_od, head, target, live, stride_oh, stride_ox, stride_od, C, TURNED)


def tiling(codec: TransformCodec) -> dict[str, int]:
    """Sizes of the codec's tiles, and most bits of its codes, as its kernels take them.

    FP is 64 for small tiles too: of a product over 16, whose operands come from bytes, Triton 3.6 took half the terms,
    twice each, on an H200, and 3.7 lays them out alike (mended by pull request 11691 of Triton).
    """
    tt, ty, tx = codec.tile
    _, height, width = codec.extent
    return {"D": codec.geometry.head_dim, "F": codec.tile_tokens, "FP": MOST_TILE_TOKENS, "TT": tt, "TY": ty, "TX": tx,
            "HEIGHT": height, "WIDTH": width, "DEPTH": codec.most_depth}  # fmt: skip


def places(codec: TransformCodec) -> dict[str, int]:
    """Bytes of a tile, where channels stand in a section, and the other fields after them, as kernels take them."""
    return {"TILE_BYTES": codec.tile_bytes, "CHANNELS": codec.layout.offset("channels")} | places_after(codec)


def places_after(codec: TransformCodec) -> dict[str, int]:
    """Where fields stand after the channels: alike for keys and values."""
    offset = codec.layout.offset
    return {name.upper(): offset(name) - offset("channels") for name in ("rows", "gains", "unit", "plan")}


def materialise(
    sections_GHB: Tensor,
    slots_N: Tensor,
    rotary: Rotary | None,
    out_HXD: Tensor,
    codec: TransformCodec,
    scaling: Scaling | None = None,
    launch: TileLaunch | None = None,
) -> None:
    """Unpack the slots' sections into N*T rows of each head, turned if tables are given, scaled for e4m3."""
    num_tokens, num_tiles, device = codec.geometry.num_tokens, codec.num_tiles, out_HXD.device
    arguments, constants = reading(sections_GHB, slots_N, rotary, out_HXD, scaling, num_tokens)
    launch = launch or default_launch(scaled=constants["SCALED"], turned=constants["TURNED"])
    channels = min(launch.channels, codec.geometry.head_dim)
    parts = codec.geometry.head_dim // channels * out_HXD.shape[0]
    materialise_kernel[triton.cdiv(num_tiles, launch.tiles), slots_N.shape[0], parts](
        *arguments, codec.cosines(device), depth_table(device, codec.most_depth), steps(device),
        K=num_tiles, TILES=launch.tiles, C=channels, num_warps=launch.warps, maxnreg=launch.registers,
        num_stages=STAGES, **constants, **tiling(codec), **places(codec),
    )  # fmt: skip
