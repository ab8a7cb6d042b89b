"""Triton twins of rtn.py: encode, and materialise with RoPE.

Both work on tiles of tokens x one head. Complex pairs are neighbours in a byte (2 and 4 bits) or in a 16-bit word (8
bits), so unpacking yields real and imaginary parts as two tensors, and RoPE costs no shuffle. Materialise walks over a
few heads with the same cosines; each thread loads CODE_BYTES of codes at a time so that what it writes is 16 contiguous
bytes and no exchange between threads is needed.

Encode is compiled without fused multiply-add, so its bytes equal the reference's. Materialise is fused: before the
rounding to the output type it differs from the reference by at most a few float32 ulps.

Shape legend: T tokens of a block, H heads, D head dim, G groups of a token, R rows of a tile, N blocks read.
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
from longtake.kernels.scaling import Scaling
from longtake.kernels.scaling_triton import emit

if TYPE_CHECKING:
    from longtake.kernels.rtn import RoundToNearest

GROUP = tl.constexpr(64)
ENCODE_ROWS = 32


@triton.jit
def encode_kernel(
    x, out, stride_t, stride_h, stride_page, tokens,
    D: tl.constexpr, BITS: tl.constexpr, GRID_OFFSET: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Quantise ROWS tokens of one head: codes and grids to their places in the payload."""
    TOP: tl.constexpr = 2**BITS - 1
    GROUPS: tl.constexpr = D // GROUP
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tokens
    tile = tl.load(
        x + row.to(tl.int64)[:, None] * stride_t + head * stride_h + tl.arange(0, D)[None, :],
        mask=live[:, None],
        other=0.0,
    )
    group = tl.reshape(tile.to(tl.float32), (ROWS, GROUPS, GROUP))
    low = tl.min(group, axis=2)
    high = tl.max(group, axis=2)
    zero = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)
    scale = tl.minimum((high - low) * (1.0 / TOP), 65504.0).to(tl.float16)
    step = scale.to(tl.float32)
    inverse = tl.where(step > 0, tl.div_rn(1.0, tl.where(step > 0, step, 1.0)), 0.0)
    level = tl.floor((group - zero.to(tl.float32)[:, :, None]) * inverse[:, :, None] + 0.5)
    code = tl.minimum(tl.maximum(level, 0.0), TOP * 1.0).to(tl.int32)

    page = out + head.to(tl.int64) * stride_page
    even, odd = tl.split(tl.reshape(code, (ROWS, D // 2, 2)))
    pair = even | (odd << BITS)
    if BITS == 8:
        place = page.to(tl.pointer_type(tl.uint16)) + row[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
        tl.store(place, pair.to(tl.uint16), mask=live[:, None])
    elif BITS == 4:
        tl.store(page + row[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :], pair.to(tl.uint8), mask=live[:, None])
    else:
        first, second = tl.split(tl.reshape(pair, (ROWS, D // 4, 2)))
        quad = first | (second << 4)
        tl.store(page + row[:, None] * (D // 4) + tl.arange(0, D // 4)[None, :], quad.to(tl.uint8), mask=live[:, None])

    word = (scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (
        zero.to(tl.int16, bitcast=True).to(tl.int32) << 16
    )
    grid = (page + GRID_OFFSET).to(tl.pointer_type(tl.int32)) + row[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    tl.store(grid, word, mask=live[:, None])


@triton.jit
def load_pairs(section, row_R, live_R, D: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr):
    """Codes of the real and the imaginary channels of a tile, int32 [ROWS, D/2] each."""
    if BITS == 8:
        column = tl.max_contiguous(tl.arange(0, D // 2), 4)[None, :]
        word = tl.load(
            section.to(tl.pointer_type(tl.uint16)) + row_R[:, None] * (D // 2) + column, mask=live_R[:, None], other=0
        )
    elif BITS == 4:
        column = tl.max_contiguous(tl.arange(0, D // 2), 4)[None, :]
        word = tl.load(section + row_R[:, None] * (D // 2) + column, mask=live_R[:, None], other=0)
    else:
        column = tl.max_contiguous(tl.arange(0, D // 4), 2)[None, :]
        quad = tl.load(section + row_R[:, None] * (D // 4) + column, mask=live_R[:, None], other=0)
        word = tl.reshape(tl.join(quad & 15, quad >> 4), (ROWS, D // 2))
    word = word.to(tl.int32)
    return word & (2**BITS - 1), word >> BITS


@triton.jit
def load_grid(section, row_R, live_R, D: tl.constexpr, ROWS: tl.constexpr, GRID_OFFSET: tl.constexpr):
    """Scale and zero point of every pair's group, float32 [ROWS, G, 1] each."""
    GROUPS: tl.constexpr = D // GROUP
    place = (
        (section + GRID_OFFSET).to(tl.pointer_type(tl.int32)) + row_R[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    )
    word = tl.load(place, mask=live_R[:, None], other=0)
    scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale[:, :, None], zero[:, :, None]


@triton.jit
def materialise_kernel(
    pages, slots, temporal, spatial, out, centre, scale,
    stride_slot, stride_page, stride_oh, stride_ox, stride_od, tokens, tokens_per_frame,
    D: tl.constexpr, PT: tl.constexpr, BITS: tl.constexpr, GRID_OFFSET: tl.constexpr, SCALED: tl.constexpr,
    TURNED: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Unpack ROWS tokens of one block for HEADS heads; turn them unless PT is 0."""
    PAIRS: tl.constexpr = GROUP // 2
    GROUPS: tl.constexpr = D // GROUP
    block = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tokens // ALIGN * ALIGN  # the same number, seen to be aligned
    if PT:
        frame = block * (tokens // tokens_per_frame) + row // tokens_per_frame
        cos, sin = turns(temporal, spatial, frame, row % tokens_per_frame, live, D, PT, ROWS, 0, D)
        cos = tl.reshape(cos, (ROWS, GROUPS, PAIRS))
        sin = tl.reshape(sin, (ROWS, GROUPS, PAIRS))
    slot = pages + tl.load(slots + block).to(tl.int64) * stride_slot
    target = block.to(tl.int64) * (tokens // ALIGN * ALIGN) + row
    for i in range(HEADS):
        head = tl.program_id(2) * HEADS + i
        section = slot + head * stride_page
        even, odd = load_pairs(section, row, live, D, BITS, ROWS)
        step, zero = load_grid(section, row, live, D, ROWS, GRID_OFFSET)
        real = tl.reshape(even.to(tl.float32), (ROWS, GROUPS, PAIRS)) * step + zero
        imag = tl.reshape(odd.to(tl.float32), (ROWS, GROUPS, PAIRS)) * step + zero
        if PT:  # noqa: SIM108
            pair = tl.join(real * cos - imag * sin, real * sin + imag * cos)
        else:
            pair = tl.join(real, imag)
        tile = tl.reshape(pair, (ROWS, D))
        emit(tile, out, head, target, live, stride_oh, stride_ox, stride_od, centre, scale, D, SCALED, TURNED)


def encode(x_THD: Tensor, out_HB: Tensor, codec: RoundToNearest) -> None:
    """Encode [T, H, D] (D 64 or 128, last dim contiguous or copied) into sections of a page."""
    x_THD = x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()
    tokens, num_heads, dim = x_THD.shape
    encode_kernel[(triton.cdiv(tokens, ENCODE_ROWS), num_heads)](
        x_THD, out_HB, x_THD.stride(0), x_THD.stride(1), out_HB.stride(0), tokens,
        D=dim, BITS=codec.bits, GRID_OFFSET=codec.layout.offset("grid"), ROWS=ENCODE_ROWS, enable_fp_fusion=False,
    )  # fmt: skip
    codec.layout.clear_padding(out_HB)


def materialise(
    sections_GHB: Tensor,
    slots_N: Tensor,
    rotary: Rotary | None,
    out_HXD: Tensor,
    codec: RoundToNearest,
    scaling: Scaling | None = None,
    launch: Launch = DEFAULT_LAUNCH,
) -> None:
    """Unpack the slots' sections into N*T rows of each head, turned if tables are given, scaled for e4m3."""
    num_heads, dim = out_HXD.shape[0], out_HXD.shape[2]
    tokens = codec.geometry.num_tokens
    arguments, constants = reading(sections_GHB, slots_N, rotary, out_HXD, scaling, tokens)
    materialise_kernel[launch.grid(tokens, slots_N.shape[0], num_heads)](
        *arguments,
        D=dim, BITS=codec.bits, GRID_OFFSET=codec.layout.offset("grid"),
        **constants, **launch.sizes(num_heads),
    )  # fmt: skip
