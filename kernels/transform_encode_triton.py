"""Triton twin of the transform codec's encoder: measure, plan, quantise; keys and values of all heads in each launch.

A block is read twice: measure sums the squares of coefficients over tiles, plan (one program for a head of K or V,
small numbers only) writes means, exponents and the plan, quantise writes gains and codes. Sums stand in another order
than the reference's: exponents, gains and codes that lie at a border may differ, so payloads of CPU and GPU differ in
bytes, not in quality; what is written is read alike by both. The same input gives the same bytes. Nothing waits for the
host.

The transform is exact to 2^-17 of a tile's largest values: bfloat16 tiles go through the tensor cores as they are, with
cosines as sums of two bfloat16 numbers (side by side in one matrix: two products in a row would take turns with how
their results lie); others as three products of TF32. With one, what large coefficients lose drowns
the small ones of very smooth channels, and with them a tile's gain. A channel's mean is taken away behind the
transform, from the first frequency, which alone knows of it.

Shape legend: T tokens, H heads, D head dim, S sides (K, V, or one alone), K tiles, F tokens of a tile and as many
frequencies, FP = 64 of a product, 0 beyond F, G groups of tiles, Q = D/4 quads of neighbouring channels.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.transform import STEPS, depth_table, pair_exponents
from longtake.kernels.transform_triton import (
    EXPONENTS,
    MOST_FALL,
    MOST_ROW,
    before_each,
    channel_mean,
    load_cosines,
    places_after,
    quad_depths,
    quad_exponents,
    tile_rows,
    tiling,
)

if TYPE_CHECKING:
    from longtake.kernels.transform import TransformCodec

TINY = tl.constexpr(1e-20)
BINS = tl.constexpr(64)  # more than there are exponents: the last is of what is none
RATES = tl.constexpr((0.0, *(1 / step for step in STEPS[1:])))
WAYS = tl.constexpr(512)  # more than there are pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeLaunch:
    """How encode is cut into programs.

    Args:
        measure_tiles, quantise_tiles: that a program walks over.
        measure_channels: of a program, at most.
        measure_warps, plan_warps, quantise_warps: of a program.
    """

    measure_tiles: int = 10
    measure_channels: int = 64
    measure_warps: int = 4
    plan_warps: int = 8
    quantise_tiles: int = 16
    quantise_warps: int = 8


DEFAULT_LAUNCH = EncodeLaunch()


@triton.jit
def choose(side, first, second):
    """The first for side 0, the second for side 1."""
    chosen = first
    if side == 1:
        chosen = second
    return chosen


@triton.jit
def load_transform(x, cosines, of_row_F, F: tl.constexpr, FP: tl.constexpr):
    """Cosines times a factor of each frequency: float32 [FP, FP]; for bfloat16 tokens two parts of them, [FP, 2 FP]."""
    exact = load_cosines(cosines, F, FP, FP) * of_row_F[:, None]
    if x.dtype.element_ty == tl.bfloat16:
        exact = load_cosines(cosines, F, FP, 2 * FP) * of_row_F[:, None]
        high = exact.to(tl.bfloat16)
        low = (exact - high.to(tl.float32)).to(tl.bfloat16)
        parts = tl.where((tl.arange(0, 2 * FP) < FP)[None, :], high, low)
    else:
        parts = exact
    return parts


@triton.jit
def coefficients(
    parts, x, tile, first, stride_t, C: tl.constexpr, F: tl.constexpr, FP: tl.constexpr,
    TT: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """C channels of a tile's frequencies, float32 [FP, C]; of bfloat16 tokens in one product, each token read twice."""
    token = tl.arange(0, parts.shape[1]) % FP
    row = tile_rows(tile, token, TT, TY, TX, HEIGHT, WIDTH)
    place = x + row.to(tl.int64)[:, None] * stride_t + (first + tl.arange(0, C))[None, :]
    tokens = tl.load(place, mask=(token < F)[:, None], other=0.0)
    if x.dtype.element_ty == tl.bfloat16:
        y = tl.dot(parts, tokens)
    else:
        y = tl.dot(parts, tokens.to(tl.float32), input_precision="tf32x3")
    return y


@triton.jit
def measure_kernel(
    k, v, cosines, energies, totals, out, k_stride_t, k_stride_h, v_stride_t, v_stride_h, stride_page, num_words,
    D: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr,
    TT: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """C channels of TILES tiles: sums of squared coefficients, [S, H, G, FP, D], taken from the block's first token.

    That token counts at the first frequency alone, so that sums of squares say how far tiles are from one another; what
    that frequency's coefficients sum to goes to totals [S, H, G, D]. A share of the page is zeroed on the way.
    """
    group, head, side = tl.program_id(0), tl.program_id(1), tl.program_id(2) // (D // C)
    first = tl.program_id(2) % (D // C) * C
    x = choose(side, k, v) + head * choose(side, k_stride_h, v_stride_h)
    stride_t = choose(side, k_stride_t, v_stride_t)
    share = tl.cdiv(num_words, 1024 * tl.num_programs(0) * tl.num_programs(2))
    words = (out + head.to(tl.int64) * stride_page).to(tl.pointer_type(tl.int32))
    begin = (tl.program_id(2) * tl.num_programs(0) + group) * share * 1024
    for i in range(share):
        word = begin + i * 1024 + tl.arange(0, 1024)
        tl.store(words + word, tl.zeros((1024,), tl.int32), mask=word < num_words)

    frequency, channel = tl.arange(0, FP), first + tl.arange(0, C)
    top = (frequency == 0)[:, None]
    parts = load_transform(x, cosines, tl.full((FP,), 1.0, tl.float32), F, FP)
    pivot = tl.where(top, (tl.load(x + channel).to(tl.float32) * tl.sqrt(F * 1.0))[None, :], 0.0)
    energy, total = tl.zeros((FP, C), tl.float32), tl.zeros((FP, C), tl.float32)
    for tile in range(group * TILES, min(group * TILES + TILES, K)):
        y = coefficients(parts, x, tile, first, stride_t, C, F, FP, TT, TY, TX, HEIGHT, WIDTH) - pivot
        energy += y * y
        total += y
    place = (side * tl.num_programs(1) + head) * tl.num_programs(0) + group
    tl.store(energies + place * (FP * D) + frequency[:, None] * D + channel[None, :], energy)
    tl.store(totals + place * D + channel, tl.sum(tl.where(top, total, 0.0), 0))


@triton.jit
def short_float(x):
    """Round to a float16 whose last 4 bits are 0; its bits, int32."""
    half = tl.minimum(tl.maximum(x, -32752.0), 32752.0).to(tl.float16)
    return ((half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) + 8) & 0xFFF0


@triton.jit
def exponent_of(share, MOST: tl.constexpr):
    """How often a share in 0 .. 1 halves its square: int32 of 0 .. MOST."""
    exponent = tl.floor(-2 * tl.math.log2(tl.maximum(share, TINY)) + 0.5)
    return tl.minimum(tl.maximum(exponent, 0.0), MOST * 1.0).to(tl.int32)


@triton.jit
def share_out(
    exponent_FD, order, num_bits, F: tl.constexpr, FP: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """How many pairs (transform.py) have their bit for sure, the exponent of the next, and the bits left for it."""
    PAIRS: tl.constexpr = EXPONENTS * DEPTH
    real = (tl.arange(0, FP) < F)[:, None]
    counts = tl.histogram(tl.reshape(tl.where(real, exponent_FD, BINS - 1), (FP * D,)), BINS)
    pair, bin = tl.arange(0, WAYS), tl.arange(0, BINS)
    of_pair = tl.load(order + pair, mask=pair < PAIRS, other=0)
    price = tl.sum(tl.where(of_pair[:, None] == bin[None, :], counts[None, :], 0), 1)
    spent = tl.cumsum(tl.where(pair < PAIRS, price, 1 << 20), 0)
    whole = tl.sum((spent <= num_bits).to(tl.int32), 0)
    left = num_bits - tl.max(tl.where(spent <= num_bits, spent, 0), 0)
    return whole, tl.load(order + tl.minimum(whole, PAIRS - 1)), left


@triton.jit
def plan_kernel(
    k, v, energies, totals, order, table, out, quads, k_stride_h, v_stride_h, stride_page, split,
    k_codes, v_codes, k_tile_bytes, v_tile_bytes,
    D: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Channels, rows, unit and plan of one head; of its quads, where they begin and four depths, [S, H, FP, Q]."""
    head, side = tl.program_id(0), tl.program_id(1)
    header = out + head.to(tl.int64) * stride_page + choose(side, k_codes, split + v_codes)
    x = choose(side, k, v) + head * choose(side, k_stride_h, v_stride_h)
    place = side * tl.num_programs(0) + head
    frequency, channel = tl.arange(0, FP), tl.arange(0, D)
    energy, total = tl.zeros((FP, D), tl.float32), tl.zeros((D,), tl.float32)
    for group in tl.static_range(GROUPS):
        source = energies + (place * GROUPS + group) * (FP * D) + frequency[:, None] * D + channel[None, :]
        energy += tl.load(source)
        total += tl.load(totals + (place * GROUPS + group) * D + channel)
    root = tl.sqrt(F * 1.0)
    pivot = tl.load(x + channel).to(tl.float32) * root
    bits = short_float((pivot + total / K) / root)
    apart = channel_mean(bits) * root - pivot
    flat = tl.where((frequency == 0)[:, None], energy, 0.0) + apart * (K * apart - 2 * total)[None, :]
    energy = tl.where((frequency == 0)[:, None], tl.maximum(flat, 0.0), energy)

    spread = tl.sqrt(tl.sum(energy, 0) / (K * F))
    fall = exponent_of(spread / tl.maximum(tl.max(spread, 0), TINY), MOST_FALL)
    height = tl.sqrt(tl.sum(energy * tl.math.exp2(fall.to(tl.float32))[None, :], 1) / (K * D))
    unit = tl.max(height, 0)
    row = exponent_of(height / tl.maximum(unit, TINY), MOST_ROW)
    num_bits = 8 * choose(side, k_tile_bytes, v_tile_bytes)
    whole, following, left = share_out(row[:, None] + fall[None, :], order, num_bits, F, FP, D, DEPTH)
    tl.store(header.to(tl.pointer_type(tl.int16)) + channel, (bits | fall).to(tl.int16))
    tl.store(header + ROWS + frequency, row.to(tl.uint8), mask=frequency < F)
    tl.store((header + UNIT).to(tl.pointer_type(tl.float32)), unit)
    tl.debug_barrier()  # what some threads wrote, all read below

    before = count_before(header, following, left, F, FP, ROWS, D // 4)
    tl.store((header + PLAN).to(tl.pointer_type(tl.int32)), whole)
    tl.store((header + PLAN).to(tl.pointer_type(tl.int32)) + 1, before)
    bits_of = tl.zeros((D // 4, FP), tl.int32)
    depth_of = tl.zeros((D // 4, FP), tl.int32)
    for i in tl.static_range(4):
        depth = quad_depths(header, table, i, 0, whole, before, D, F, FP, DEPTH, ROWS, D // 4)
        bits_of += depth
        depth_of |= depth << (16 + 3 * i)
    start = before_each(bits_of, tl.sum(bits_of, 0))
    target = quads + place * (FP * (D // 4)) + frequency[None, :] * (D // 4) + tl.arange(0, D // 4)[:, None]
    tl.store(target, start | depth_of)


@triton.jit
def count_before(header, following, left, F: tl.constexpr, FP: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr):
    """Before which coefficient stand those of the exponent that have one more bit."""
    real = (tl.arange(0, FP) < F)[None, :]
    count = tl.zeros((Q, FP), tl.int32)
    for i in tl.static_range(4):
        count += (real & (quad_exponents(header, i, 0, F, FP, ROWS, Q) == following)).to(tl.int32)
    met = before_each(count, tl.sum(count, 0))
    before = tl.zeros((Q, FP), tl.int32)
    for i in tl.static_range(4):
        met += (quad_exponents(header, i, 0, F, FP, ROWS, Q) == following).to(tl.int32)
        before += (real & (met <= left)).to(tl.int32)
    return tl.sum(tl.sum(before, 1), 0)


@triton.jit
def reciprocal(x):
    """1 / x, 0 where x is 0."""
    return tl.where(x > 0, 1.0 / tl.where(x > 0, x, 1.0), 0.0)


@triton.jit
def inverse_step(depth, DEPTH: tl.constexpr):
    """1 / step of a depth, 0 of 0: chosen, for what is loaded from a table would stand in other threads."""
    odd, two = depth & 1 != 0, depth & 2 != 0
    low = tl.where(odd, tl.where(two, RATES[3], RATES[1]), tl.where(two, RATES[2], 0.0))
    high = tl.where(odd, RATES[5], tl.where(two, RATES[6], RATES[4]))
    if DEPTH > 6:
        high = tl.where(odd & two, RATES[7], high)
    return tl.where(depth & 4 != 0, high, low)


@triton.jit
def code_of(y, inverse, depth):
    """Code of a coefficient, int32."""
    level = tl.floor(y * inverse + 0.5 * (1 << depth).to(tl.float32)).to(tl.int32)
    return tl.minimum(tl.maximum(level, 0), (1 << depth) - 1)


@triton.jit
def nth_word(low, high, nth, i: tl.constexpr):
    """What four quads put into the i-th word from where they begin: low bits, and what the word before left over."""
    return tl.sum(tl.where(nth == i, low, 0) | tl.where(nth == i - 1, high, 0), 2)


@triton.jit
def put_bits(stream, value_FQ, place_FQ, FP: tl.constexpr, Q: tl.constexpr, DEPTH: tl.constexpr):
    """Or the bits of quads, 4 DEPTH at most each, into words that are zero or have others' bits.

    Four quads that follow one another are put together first. Those of 24 bits lie in four words; those of 28 may
    reach into a fifth.
    """
    value, place = tl.reshape(value_FQ, (FP, Q // 4, 4)), tl.reshape(place_FQ, (FP, Q // 4, 4))
    first = tl.min(place, 2) >> 5
    nth, shift = (place >> 5) - first[:, :, None], place & 31
    low, high = value << shift, (value >> 1) >> (31 - shift)
    even = tl.join(nth_word(low, high, nth, 0), nth_word(low, high, nth, 2))
    odd = tl.join(nth_word(low, high, nth, 1), nth_word(low, high, nth, 3))
    word = tl.reshape(tl.join(even, odd), (FP, Q))
    which = tl.reshape(first[:, :, None] + tl.arange(0, 4)[None, None, :], (FP, Q))
    words = stream.to(tl.pointer_type(tl.int32))
    tl.atomic_or(words + which, word, mask=word != 0, sem="relaxed")
    if DEPTH > 6:
        fifth = nth_word(low, high, nth, 4)
        tl.atomic_or(words + first + 4, fifth, mask=fifth != 0, sem="relaxed")


@triton.jit
def quantise_kernel(
    k, v, cosines, quads, out, k_stride_t, k_stride_h, v_stride_t, v_stride_h, stride_page, split,
    k_codes, v_codes, k_tile_bytes, v_tile_bytes,
    D: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, DEPTH: tl.constexpr,
    ROWS: tl.constexpr, GAINS: tl.constexpr, UNIT: tl.constexpr,
    TT: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gains and codes of TILES tiles of one head."""
    head, side = tl.program_id(1), tl.program_id(2)
    section = out + head.to(tl.int64) * stride_page + choose(side, 0, split)
    header = section + choose(side, k_codes, v_codes)
    x = choose(side, k, v) + head * choose(side, k_stride_h, v_stride_h)
    stride_t = choose(side, k_stride_t, v_stride_t)
    tile_bits = 8 * choose(side, k_tile_bytes, v_tile_bytes)
    frequency, channel, quad = tl.arange(0, FP), tl.arange(0, D), tl.arange(0, D // 4)
    word = tl.load(header.to(tl.pointer_type(tl.int16)) + channel).to(tl.int32)
    row = tl.load(header + ROWS + frequency, mask=frequency < F, other=0).to(tl.float32)
    root = tl.sqrt(F * 1.0)
    of_row = tl.math.exp2(0.5 * row)
    mean = tl.where((frequency == 0)[:, None], (channel_mean(word) * root)[None, :] * of_row[:, None], 0.0)
    unit = tl.load((header + UNIT).to(tl.pointer_type(tl.float32)))
    of_channel = reciprocal(unit) * tl.math.exp2(0.5 * (word & 15).to(tl.float32))
    place = (side * tl.num_programs(1) + head) * (FP * (D // 4)) + frequency[:, None] * (D // 4) + quad[None, :]
    known = tl.load(quads + place)
    start, d0, d1, d2, d3 = known & 0xFFFF, known >> 16 & 7, known >> 19 & 7, known >> 22 & 7, known >> 25 & 7
    i0, i1 = inverse_step(d0, DEPTH), inverse_step(d1, DEPTH)
    i2, i3 = inverse_step(d2, DEPTH), inverse_step(d3, DEPTH)
    parts = load_transform(x, cosines, of_row, F, FP)
    begin = tl.program_id(0) * TILES
    for tile in tl.range(begin, min(begin + TILES, K), disable_licm=True):
        y = coefficients(parts, x, tile, 0, stride_t, D, F, FP, TT, TY, TX, HEIGHT, WIDTH)
        y = (y - mean) * of_channel[None, :]
        gain = tl.minimum(tl.sqrt(tl.sum(tl.sum(y * y, 1), 0) / (F * D)), 448.0).to(tl.float8e4nv)
        tl.store((header + GAINS).to(tl.pointer_type(tl.float8e4nv)) + tile, gain)
        even, odd = tl.split(tl.reshape(y * reciprocal(gain.to(tl.float32)), (FP, D // 4, 2, 2)))
        y0, y2 = tl.split(even)
        y1, y3 = tl.split(odd)
        value = code_of(y0, i0, d0) | code_of(y1, i1, d1) << d0
        value |= (code_of(y2, i2, d2) | code_of(y3, i3, d3) << d2) << (d0 + d1)
        put_bits(section, value, tile * tile_bits + start, FP, D // 4, DEPTH)


def encode(
    xs_THD: tuple[Tensor, ...],
    out_HB: Tensor,
    codecs: tuple[TransformCodec, ...],
    launch: EncodeLaunch = DEFAULT_LAUNCH,
) -> None:
    """Encode K and V, or one of them, into sections of a page that follow one another.

    Args:
        xs_THD: one or two of [T, H, D], of one type, D 64 or 128; last dim contiguous, or they are copied.
        out_HB: uint8 [H, bytes of all sections].
        codecs: one for each, with codes of as many bits at most.
        launch: sizes of programs.
    """
    xs_THD = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in xs_THD)
    num_heads, known = xs_THD[0].shape[1], sizes(xs_THD, out_HB, codecs, launch)
    device, side, codec = out_HB.device, len(xs_THD), codecs[0]
    padded, dim = known["FP"], known["D"]
    groups = triton.cdiv(codec.num_tiles, launch.measure_tiles)
    energies = torch.empty((side, num_heads, groups, padded, dim), dtype=torch.float32, device=device)
    totals = torch.empty((side, num_heads, groups, dim), dtype=torch.float32, device=device)
    quads = torch.empty((side, num_heads, padded, dim // 4), dtype=torch.int32, device=device)
    x = (xs_THD[0], xs_THD[-1])
    parts = dim // min(dim, launch.measure_channels)
    start(measure_kernel, (groups, num_heads, side * parts), launch.measure_warps, known, *x, codec.cosines(device),
          energies, totals, out_HB)  # fmt: skip
    start(plan_kernel, (num_heads, side), launch.plan_warps, known, *x, energies, totals,
          pair_exponents(device, known["DEPTH"]), depth_table(device, known["DEPTH"]), out_HB, quads)  # fmt: skip
    known["TILES"] = launch.quantise_tiles
    programs = triton.cdiv(codec.num_tiles, launch.quantise_tiles), num_heads, side
    start(quantise_kernel, programs, launch.quantise_warps, known, *x, codec.cosines(device), quads, out_HB)


def start(kernel: Any, grid: tuple[int, ...], warps: int, known: dict[str, int], *tensors: Tensor) -> None:
    """Launch a kernel with tensors, and what it wants of the known numbers."""
    wanted = {name: known[name] for name in kernel.arg_names if name in known}
    kernel[grid](*tensors, **wanted, num_warps=warps)


def sizes(
    xs_THD: tuple[Tensor, ...], out_HB: Tensor, codecs: tuple[TransformCodec, ...], launch: EncodeLaunch
) -> dict[str, int]:
    """Every number that the three kernels take, by name."""
    k, v, codec = xs_THD[0], xs_THD[-1], codecs[0]
    return {
        **tiling(codec),
        **places_after(codec),
        "K": codec.num_tiles,
        "TILES": launch.measure_tiles,
        "C": min(codec.geometry.head_dim, launch.measure_channels),
        "GROUPS": triton.cdiv(codec.num_tiles, launch.measure_tiles),
        "k_stride_t": k.stride(0),
        "k_stride_h": k.stride(1),
        "v_stride_t": v.stride(0),
        "v_stride_h": v.stride(1),
        "stride_page": out_HB.stride(0),
        "num_words": sum(one.num_bytes for one in codecs) // 4,
        "split": codec.num_bytes,
        "k_codes": codec.layout.offset("channels"),
        "v_codes": codecs[-1].layout.offset("channels"),
        "k_tile_bytes": codec.tile_bytes,
        "v_tile_bytes": codecs[-1].tile_bytes,
    }
