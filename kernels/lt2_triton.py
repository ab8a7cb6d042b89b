"""Triton twins of lt2.py: fit (one program a head), quantise, and materialise with RoPE.

Fit and quantise together are the encoder: fit reads about a thousand tokens three times (from L2), quantise reads the
block once. Fit's directions differ from the reference's in last bits (sums in another order, products of bfloat16 for
the covariance), so payloads of CPU and GPU differ in bytes, not in quality; what is written is read alike by both.

Shape legend: T tokens of a block, H heads, D head dim, R directions, N sampled tokens, ROWS rows of a tile.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.arena_triton import DEFAULT_LAUNCH, Launch, reading
from longtake.kernels.rotary import Rotary
from longtake.kernels.rotary_triton import turns
from longtake.kernels.rtn_triton import load_pairs
from longtake.kernels.scaling import Scaling
from longtake.kernels.scaling_triton import emit

if TYPE_CHECKING:
    from longtake.kernels.lt2 import LowRankTwoBit

FIT_ROWS = 64
FIT_WARPS = 8
QUANTISE_ROWS = 32
WIDE = tl.constexpr(16)  # columns of the iterated matrix: the least that tl.dot takes
TINY = tl.constexpr(1e-20)


@triton.jit
def short_float(x):
    """Round to a float16 whose last 4 bits are 0; its bits, int32."""
    half = tl.minimum(tl.maximum(x, -32752.0), 32752.0).to(tl.float16)
    return ((half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) + 8) & 0xFFF0


@triton.jit
def channel_mean(word):
    """Mean in a channel's 16 bits (as int32), float32."""
    return (word & 0xFFF0).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def channel_spread(word, largest):
    """Spread in a channel's 16 bits (as int32), float32."""
    fall = word & 15
    return largest * (tl.where(fall % 2 == 1, 0.7071067811865476, 1.0) * tl.math.exp2(-(fall // 2).to(tl.float32)))


@triton.jit
def load_direction(section, r, unit, D: tl.constexpr, DIRECTIONS: tl.constexpr):
    """One direction, float32 [D]."""
    place = (section + DIRECTIONS).to(tl.pointer_type(tl.int8)) + r * D + tl.arange(0, D)
    return tl.load(place).to(tl.float32) * unit


@triton.jit
def orthonormalise(v, D: tl.constexpr, R: tl.constexpr):
    """Gram-Schmidt on the first R columns of v [D, WIDE]."""
    index = tl.arange(0, WIDE)[None, :]
    for r in tl.static_range(R):
        column = tl.sum(tl.where(index == r, v, 0.0), 1)
        column = column * tl.rsqrt(tl.maximum(tl.sum(column * column, 0), TINY))
        later = v - column[:, None] * tl.sum(column[:, None] * v, 0)[None, :]
        v = tl.where(index == r, column[:, None], tl.where(index > r, later, v))
    return v


@triton.jit
def load_sample(x, first, sampled, stride, stride_t, D: tl.constexpr, ROWS: tl.constexpr):
    """ROWS sampled tokens, float32 [ROWS, D], and which of them exist, [ROWS, 1]."""
    row = first + tl.arange(0, ROWS)
    live = (row < sampled)[:, None]
    place = x + (row * stride).to(tl.int64)[:, None] * stride_t + tl.arange(0, D)[None, :]
    return tl.load(place, mask=live, other=0.0).to(tl.float32), live


@triton.jit
def fit_kernel(
    x, start, out, stride_t, stride_h, stride_page, sampled, stride,
    D: tl.constexpr, R: tl.constexpr, ITERATIONS: tl.constexpr, DIRECTIONS: tl.constexpr, CHANNELS: tl.constexpr,
    UNITS: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Directions, channels and units of one head, from sampled tokens."""
    head = tl.program_id(0)
    x = x + head * stride_h
    section = out + head.to(tl.int64) * stride_page
    total = tl.zeros((ROWS, D), tl.float32)
    for first in range(0, sampled, ROWS):
        tile, _ = load_sample(x, first, sampled, stride, stride_t, D, ROWS)
        total += tile
    bits = short_float(tl.sum(total, 0) / sampled)
    mean = channel_mean(bits)

    covariance = tl.zeros((D, D), tl.float32)
    for first in range(0, sampled, ROWS):
        tile, live = load_sample(x, first, sampled, stride, stride_t, D, ROWS)
        rest = tl.where(live, tile - mean[None, :], 0.0).to(DOT)
        covariance = tl.dot(tl.trans(rest), rest, covariance)
    covariance = covariance * (1.0 / sampled)
    index = tl.arange(0, WIDE)[None, :]
    channel = tl.arange(0, D)
    v = tl.load(start + channel[:, None] * 8 + index, mask=index < R, other=0.0)
    for i in tl.static_range(ITERATIONS):
        v = tl.dot(covariance, v, input_precision="tf32x3")
        if i % 2 == 1:
            v = orthonormalise(v, D, R)
    variance = tl.maximum(tl.sum(v * tl.dot(covariance, v, input_precision="tf32x3"), 0), 0.0)
    scaled = tl.where(index < R, v * (tl.sqrt(variance) * 0.3352)[None, :], 0.0)
    unit = tl.max(tl.max(tl.abs(scaled), 1), 0) * (1.0 / 127)
    stored = tl.minimum(tl.maximum(tl.floor(scaled / tl.maximum(unit, TINY) + 0.5), -127.0), 127.0)
    place = (section + DIRECTIONS).to(tl.pointer_type(tl.int8)) + index * D + channel[:, None]
    tl.store(place, stored.to(tl.int8), mask=index < R)
    tl.debug_barrier()  # what some threads wrote, all read below

    square = tl.zeros((ROWS, D), tl.float32)
    for first in range(0, sampled, ROWS):
        rest, live = load_sample(x, first, sampled, stride, stride_t, D, ROWS)
        rest = rest - mean[None, :]
        for r in tl.static_range(R):
            direction = load_direction(section, r, unit, D, DIRECTIONS)
            inverse = 1.0 / tl.maximum(tl.sum(direction * direction, 0), TINY)
            code = tl.minimum(tl.maximum(tl.floor(tl.sum(rest * direction[None, :], 1) * inverse + 8), 0.0), 15.0)
            rest = rest - (code - 7.5)[:, None] * direction[None, :]
        square += tl.where(live, rest * rest, 0.0)
    spread = tl.sqrt(tl.sum(square, 0) / sampled)
    largest = tl.max(spread, 0)
    ratio = tl.maximum(spread / tl.maximum(largest, TINY), TINY)
    fall = tl.minimum(tl.maximum(tl.floor(-2 * tl.math.log2(ratio) + 0.5), 0.0), 15.0).to(tl.int32)
    tl.store((section + CHANNELS).to(tl.pointer_type(tl.int16)) + channel, (bits | fall).to(tl.int16))
    units = (section + UNITS).to(tl.pointer_type(tl.float32))
    tl.store(units, unit)
    tl.store(units + 1, largest)


@triton.jit
def quantise_kernel(
    x, out, stride_t, stride_h, stride_page, tokens,
    D: tl.constexpr, R: tl.constexpr, COEFFICIENTS: tl.constexpr, GAINS: tl.constexpr, DIRECTIONS: tl.constexpr,
    CHANNELS: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Codes, coefficients and gains of ROWS tokens of one head."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tokens
    channel = tl.arange(0, D)
    section = out + head.to(tl.int64) * stride_page
    units = (section + UNITS).to(tl.pointer_type(tl.float32))
    unit, largest = tl.load(units), tl.load(units + 1)
    word = tl.load((section + CHANNELS).to(tl.pointer_type(tl.int16)) + channel).to(tl.int32)
    place = x + row.to(tl.int64)[:, None] * stride_t + head * stride_h + channel[None, :]
    rest = tl.load(place, mask=live[:, None], other=0.0).to(tl.float32) - channel_mean(word)[None, :]
    packed = tl.zeros((ROWS,), tl.int32)
    for r in tl.static_range(R):
        direction = load_direction(section, r, unit, D, DIRECTIONS)
        inverse = 1.0 / tl.maximum(tl.sum(direction * direction, 0), TINY)
        code = tl.minimum(tl.maximum(tl.floor(tl.sum(rest * direction[None, :], 1) * inverse + 8), 0.0), 15.0)
        rest = rest - (code - 7.5)[:, None] * direction[None, :]
        packed = packed | (code.to(tl.int32) << (4 * r))
    spread = channel_spread(word, largest)
    rest = rest * tl.where(spread > 0, 1.0 / tl.where(spread > 0, spread, 1.0), 0.0)[None, :]
    gain = tl.minimum(tl.sqrt(tl.sum(rest * rest, 1) * (0.9957 * 0.9957 / D)), 448.0).to(tl.float8e4nv)
    step = gain.to(tl.float32)
    inverse = tl.where(step > 0, 1.0 / tl.where(step > 0, step, 1.0), 0.0)
    level = tl.minimum(tl.maximum(tl.floor(rest * inverse[:, None] + 2), 0.0), 3.0).to(tl.int32)

    even, odd = tl.split(tl.reshape(level, (ROWS, D // 2, 2)))
    first, second = tl.split(tl.reshape(even | (odd << 2), (ROWS, D // 4, 2)))
    quad = first | (second << 4)
    tl.store(section + row[:, None] * (D // 4) + tl.arange(0, D // 4)[None, :], quad.to(tl.uint8), mask=live[:, None])
    tl.store((section + GAINS).to(tl.pointer_type(tl.float8e4nv)) + row, gain, mask=live)
    if R == 8:
        tl.store((section + COEFFICIENTS).to(tl.pointer_type(tl.int32)) + row, packed, mask=live)
    elif R == 4:
        tl.store((section + COEFFICIENTS).to(tl.pointer_type(tl.int16)) + row, packed.to(tl.int16), mask=live)
    else:
        tl.store(section + COEFFICIENTS + row, packed.to(tl.uint8), mask=live)


@triton.jit
def load_coefficients(section, row, live, R: tl.constexpr, COEFFICIENTS: tl.constexpr):
    """All coefficients of each token, 4 bits each, in an int32 [ROWS]."""
    if R == 8:
        packed = tl.load((section + COEFFICIENTS).to(tl.pointer_type(tl.int32)) + row, mask=live, other=0)
    elif R == 4:
        packed = tl.load((section + COEFFICIENTS).to(tl.pointer_type(tl.int16)) + row, mask=live, other=0).to(tl.int32)
    else:
        packed = tl.load(section + COEFFICIENTS + row, mask=live, other=0).to(tl.int32)
    return packed


@triton.jit
def materialise_kernel(
    pages, slots, temporal, spatial, out, centre, scale,
    stride_slot, stride_page, stride_oh, stride_ox, stride_od, tokens, tokens_per_frame,
    D: tl.constexpr, PT: tl.constexpr, R: tl.constexpr, COEFFICIENTS: tl.constexpr, GAINS: tl.constexpr,
    DIRECTIONS: tl.constexpr, CHANNELS: tl.constexpr, UNITS: tl.constexpr, SCALED: tl.constexpr, TURNED: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Unpack ROWS tokens of one block for HEADS heads; turn them unless PT is 0."""
    block = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tokens // ALIGN * ALIGN  # the same number, seen to be aligned
    if PT:
        frame = block * (tokens // tokens_per_frame) + row // tokens_per_frame
        cos, sin = turns(temporal, spatial, frame, row % tokens_per_frame, live, D, PT, ROWS, 0, D)
    slot = pages + tl.load(slots + block).to(tl.int64) * stride_slot
    target = block.to(tl.int64) * (tokens // ALIGN * ALIGN) + row
    pair = tl.arange(0, D // 2)
    for i in range(HEADS):
        head = tl.program_id(2) * HEADS + i
        section = slot + head * stride_page
        units = (section + UNITS).to(tl.pointer_type(tl.float32))
        unit, largest = tl.load(units), tl.load(units + 1)
        even, odd = load_pairs(section, row, live, D, 2, ROWS)
        gain = tl.load((section + GAINS).to(tl.pointer_type(tl.float8e4nv)) + row, mask=live, other=0.0)
        gain = gain.to(tl.float32)[:, None]
        packed = load_coefficients(section, row, live, R, COEFFICIENTS)
        words = tl.load((section + CHANNELS).to(tl.pointer_type(tl.int32)) + pair)  # two channels each
        low_words, high_words = words & 0xFFFF, (words >> 16) & 0xFFFF
        real = tl.zeros((ROWS, D // 2), tl.float32) + channel_mean(low_words)[None, :]
        imag = tl.zeros((ROWS, D // 2), tl.float32) + channel_mean(high_words)[None, :]
        for r in tl.static_range(R):
            both = tl.load((section + DIRECTIONS).to(tl.pointer_type(tl.int16)) + r * (D // 2) + pair).to(tl.int32)
            coefficient = (((packed >> (4 * r)) & 15).to(tl.float32) - 7.5)[:, None]
            real += coefficient * (both.to(tl.int8).to(tl.float32) * unit)[None, :]
            imag += coefficient * ((both >> 8).to(tl.float32) * unit)[None, :]
        real += (even.to(tl.float32) - 1.5) * gain * channel_spread(low_words, largest)[None, :]
        imag += (odd.to(tl.float32) - 1.5) * gain * channel_spread(high_words, largest)[None, :]
        if PT:  # noqa: SIM108
            both = tl.join(real * cos - imag * sin, real * sin + imag * cos)
        else:
            both = tl.join(real, imag)
        tile = tl.reshape(both, (ROWS, D))
        emit(tile, out, head, target, live, stride_oh, stride_ox, stride_od, centre, scale, D, SCALED, TURNED)


def encode(x_THD: Tensor, out_HB: Tensor, codec: LowRankTwoBit) -> None:
    """Encode [T, H, D] (D 64 or 128, last dim contiguous or copied) into sections of a page."""
    x_THD = x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()
    fit(x_THD, out_HB, codec)
    quantise(x_THD, out_HB, codec)
    codec.layout.clear_padding(out_HB)


def fit(x_THD: Tensor, out_HB: Tensor, codec: LowRankTwoBit) -> None:
    """Write directions, channels and units of each head."""
    from longtake.kernels.lt2 import ITERATIONS, RANKS, start_directions

    tokens, num_heads, dim = x_THD.shape
    offset, stride = codec.layout.offset, codec.sample_stride
    start = start_directions(dim, max(RANKS), x_THD.device)
    fit_kernel[(num_heads,)](
        x_THD, start, out_HB, x_THD.stride(0), x_THD.stride(1), out_HB.stride(0), triton.cdiv(tokens, stride), stride,
        D=dim, R=codec.rank, ITERATIONS=ITERATIONS, DIRECTIONS=offset("directions"), CHANNELS=offset("channels"),
        UNITS=offset("units"), DOT=tl.bfloat16 if x_THD.is_cuda else tl.float32, ROWS=FIT_ROWS, num_warps=FIT_WARPS,
    )  # fmt: skip


def quantise(x_THD: Tensor, out_HB: Tensor, codec: LowRankTwoBit) -> None:
    """Write codes, coefficients and gains of each head, given what `fit` wrote."""
    tokens, num_heads, dim = x_THD.shape
    offset = codec.layout.offset
    quantise_kernel[(triton.cdiv(tokens, QUANTISE_ROWS), num_heads)](
        x_THD, out_HB, x_THD.stride(0), x_THD.stride(1), out_HB.stride(0), tokens,
        D=dim, R=codec.rank, COEFFICIENTS=offset("coefficients"), GAINS=offset("gains"),
        DIRECTIONS=offset("directions"), CHANNELS=offset("channels"), UNITS=offset("units"), ROWS=QUANTISE_ROWS,
    )  # fmt: skip


def materialise(
    sections_GHB: Tensor,
    slots_N: Tensor,
    rotary: Rotary | None,
    out_HXD: Tensor,
    codec: LowRankTwoBit,
    scaling: Scaling | None = None,
    launch: Launch = DEFAULT_LAUNCH,
) -> None:
    """Unpack the slots' sections into N*T rows of each head, turned if tables are given, scaled for e4m3."""
    num_heads, dim = out_HXD.shape[0], out_HXD.shape[2]
    tokens = codec.geometry.num_tokens
    arguments, constants = reading(sections_GHB, slots_N, rotary, out_HXD, scaling, tokens)
    offset = codec.layout.offset
    materialise_kernel[launch.grid(tokens, slots_N.shape[0], num_heads)](
        *arguments,
        D=dim, R=codec.rank, COEFFICIENTS=offset("coefficients"), GAINS=offset("gains"),
        DIRECTIONS=offset("directions"), CHANNELS=offset("channels"), UNITS=offset("units"),
        **constants, **launch.sizes(num_heads),
    )  # fmt: skip
