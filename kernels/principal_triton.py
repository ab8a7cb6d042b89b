"""Triton kernel of the codecs that turn heads: rows of two tensors times their head's matrix, and in place.

One kernel serves both ways. To unpack, rows are components as `tc`'s kernel leaves them in bfloat16, and become keys,
with RoPE, and values, scaled for e4m3 if asked. To encode, rows are keys and values, and become components. Sums are
float32, and rounded once. A program keeps its head's matrix in shared memory, 128 KB at D = 128, and walks over tiles
of tokens; a tile's rows are on their way while the one before is multiplied and put in place.

Shape legend: G slots, H heads, T tokens of a block, D head dim, E = 2 D, I = 2 H sections of a page, S bytes of a
section, N blocks, X rows, R rows of a tile.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.rotary import HeadRotary, Rotary, Turns
from longtake.kernels.rotary_triton import turns
from longtake.kernels.scaling import Scaling
from longtake.kernels.scaling_triton import put, token_alignment

if TYPE_CHECKING:
    from longtake.kernels.transform import TransformCodec

COMPONENTS = torch.bfloat16  # tc's kernel unpacks into it
CHUNK_ELEMENTS = 1 << 27  # components that lie there at a time: those of 9 blocks of 4,680 tokens x 12 heads x 128
# An H200, 4 blocks of that size into FP8: 0.098 ms. A program of one side, two of them on a processor: 0.124 and more;
# tiles on their way into shared memory instead of registers: 0.115.
ROWS, WARPS, STAGES = 64, 8, 1
START_TILES = 2  # that take as long as a program's start
Target: TypeAlias = tuple[Tensor, Scaling | None]
"""Where rows go, [H, X, D], and how they are scaled."""


@triton.jit
def load_rows(
    x, z, tile, end, rows, stride_xr, stride_zr, D: tl.constexpr, ROWS: tl.constexpr, JOINED: tl.constexpr
):  # fmt: skip
    """Rows of x, and beside them those of z: [ROWS, 2 D], 0 from tile `end` and row `rows` on.

    JOINED: z's channels follow x's.
    """
    column, nth = tl.arange(0, 2 * D)[None, :], tl.arange(0, ROWS)[:, None]
    start = tl.cast(tile * ROWS, tl.int64)
    place = x + start * stride_xr + nth * stride_xr + column
    if not JOINED:
        place = tl.where(column < D, place, z + start * stride_zr + nth * stride_zr + (column - D))
    live = (tile < end) & (tile * ROWS + nth < rows)
    return tl.load(place, mask=live, other=0.0)


@triton.jit
def load_half(matrix, head, FIRST: tl.constexpr, D: tl.constexpr):
    """Columns FIRST .. FIRST + D of a head's matrix, [2 D, D]."""
    row, column = tl.arange(0, 2 * D)[:, None], FIRST + tl.arange(0, D)[None, :]
    return tl.load(matrix + (head * (2 * D) + row) * (2 * D) + column)


@triton.jit(do_not_specialize=["first_row", "rows", "tiles"])  # one build for histories and chunks of any length
def turn_kernel(
    x, z, matrix, temporal, spatial, stride_xh, stride_xr, stride_zh, stride_zr, first_row, rows, tiles,
    out_k, centre_k, scale_k, k_stride_oh, k_stride_ox, k_stride_od,
    out_v, centre_v, scale_v, v_stride_oh, v_stride_ox, v_stride_od,
    tokens_per_frame: tl.constexpr, D: tl.constexpr, PT: tl.constexpr, SCALED: tl.constexpr,
    K_TURNED: tl.constexpr, V_TURNED: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Tiles of one head: the first D columns of the product, with RoPE unless PT is 0, and the others."""
    head, nth = tl.program_id(0), tl.arange(0, ROWS)
    k_half, v_half = load_half(matrix, head, 0, D), load_half(matrix, head, D, D)
    if SCALED:
        channel = head * D + tl.arange(0, D)
        k_centre, k_factor = tl.load(centre_k + channel), 1.0 / tl.load(scale_k + head)
        v_centre, v_factor = tl.load(centre_v + channel), 1.0 / tl.load(scale_v + head)
    x += head * stride_xh
    z += head * stride_zh
    begin = tl.program_id(1) * tiles
    end = min(begin + tiles, tl.cdiv(rows, ROWS))
    following = load_rows(x, z, begin, end, rows, stride_xr, stride_zr, D, ROWS, JOINED)
    for tile in tl.range(begin, end):
        tokens = following
        following = load_rows(x, z, tile + 1, end, rows, stride_xr, stride_zr, D, ROWS, JOINED)
        k = tl.dot(tokens, k_half, input_precision="tf32x3")
        v = tl.dot(tokens, v_half, input_precision="tf32x3")
        live = tile * ROWS + nth < rows // ALIGN * ALIGN  # the same number, seen to be aligned
        start = first_row // ALIGN * ALIGN + tile * ROWS
        if PT:  # loaded behind the products: what is loaded before them is waited for before they begin
            frame, place = (start + nth) // tokens_per_frame, (start + nth) % tokens_per_frame
            cos, sin = turns(temporal, spatial, frame, place, live, D, PT, ROWS, 0, D)
            real, imag = tl.split(tl.reshape(k, (ROWS, D // 2, 2)))
            k = tl.reshape(tl.join(real * cos - imag * sin, real * sin + imag * cos), (ROWS, D))
        if SCALED:
            k = tl.clamp((k - k_centre[None, :]) * k_factor, -448.0, 448.0)
            v = tl.clamp((v - v_centre[None, :]) * v_factor, -448.0, 448.0)
        k_rows = out_k + tl.cast(start, tl.int64) * k_stride_ox
        v_rows = out_v + tl.cast(start, tl.int64) * v_stride_ox
        put(k, k_rows, head, nth, live, k_stride_oh, k_stride_ox, k_stride_od, D, K_TURNED)
        put(v, v_rows, head, nth, live, v_stride_oh, v_stride_ox, v_stride_od, D, V_TURNED)


def turn(
    rows_HXD: tuple[Tensor, Tensor],
    matrix_HEE: Tensor,
    rotary: Rotary | None,
    first: Target,
    second: Target,
    span: tuple[int, int, int],
) -> None:
    """Write rows times their head's matrix.

    Args:
        rows_HXD: two tensors [H, X, D] of one 2-byte type, D 64 or 128, channels contiguous, taken side by side.
        matrix_HEE: of the same type, contiguous.
        rotary: tables of all rows of the outputs, for the first of them; None: they are not turned.
        first: where the first D channels of the product go, float or e4m3 with its scaling, channels or tokens
            contiguous.
        second: where the others go, of the same type.
        span: which row of the outputs is the first, how many are written, and what both are multiples of.
    """
    (x, z), (k, k_scaling), (v, v_scaling) = rows_HXD, first, second
    (num_heads, _, dim), (first_row, rows, unit) = x.shape, span
    joined = x.stride() == z.stride() and z.data_ptr() - x.data_ptr() == dim * x.element_size()
    assert matrix_HEE.is_contiguous() and matrix_HEE.dtype == x.dtype == z.dtype and k.dtype == v.dtype
    temporal, spatial, per_frame, pairs = matrix_HEE, matrix_HEE, 1, 0
    if rotary is not None:
        temporal, spatial = rotary.temporal_YP2, rotary.spatial_SQ2
        per_frame, pairs = rotary.tokens_per_frame, temporal.shape[1]
    all_tiles = triton.cdiv(rows, ROWS)
    tiles = share(all_tiles, num_heads, num_processors(x.device))
    turn_kernel[num_heads, triton.cdiv(all_tiles, tiles)](
        x, z, matrix_HEE, temporal, spatial, *x.stride()[:2], *z.stride()[:2], first_row, rows, tiles,
        *placed(k, k_scaling), *placed(v, v_scaling),
        tokens_per_frame=per_frame, D=dim, PT=pairs, SCALED=k_scaling is not None,
        K_TURNED=k.stride(2) != 1, V_TURNED=v.stride(2) != 1, ROWS=ROWS, ALIGN=token_alignment(unit), JOINED=joined,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where Triton's interpreter runs kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def share(tiles: int, num_heads: int, processors: int) -> int:
    """Tiles of a program, so that all heads' programs fill the processors evenly, in one round or a few."""
    programs = [max(1, rounds * processors // num_heads) for rounds in range(1, 5)]
    costs = [rounds * (triton.cdiv(tiles, count) + START_TILES) for rounds, count in enumerate(programs, 1)]
    return int(triton.cdiv(tiles, programs[costs.index(min(costs))]))


def placed(out_HXD: Tensor, scaling: Scaling | None) -> tuple[Any, ...]:
    """An output as the kernel takes it."""
    centre, scale = (out_HXD, out_HXD) if scaling is None else (scaling.centre_HD, scaling.scale_H)
    return (out_HXD, centre, scale, *out_HXD.stride())


def materialise(
    sections_GIS: Tensor,
    slots_N: Tensor,
    rotary: Turns,
    keys: Target,
    values: Target,
    coder: TransformCodec,
    back_HEE: Tensor,
) -> None:
    """Unpack the slots' sections into components, some blocks at a time, and those into N*T rows of keys and values.

    Args:
        sections_GIS: uint8 [G, 2 H, S]: y1 and y2 of each head.
        slots_N, rotary: as for Codec.materialise.
        keys: where they go, and their scaling.
        values: likewise.
        coder: of the sections.
        back_HEE: turns components back.
    """
    tokens, dim, sections = coder.geometry.num_tokens, coder.geometry.head_dim, sections_GIS.shape[1]
    chunks = triton.cdiv(len(slots_N), max(1, CHUNK_ELEMENTS // (sections * tokens * dim)))
    chunk = triton.cdiv(len(slots_N), chunks)
    y_IXD = torch.empty((chunk * tokens, sections, dim), dtype=COMPONENTS, device=back_HEE.device).transpose(0, 1)
    back_HEE = back_HEE.to(COMPONENTS)
    for block in range(0, len(slots_N), chunk):
        slots = slots_N[block : block + chunk]
        coder.unpack_by_kernels(sections_GIS, slots, None, y_IXD, None)
        span, y1_HXD, y2_HXD = (block * tokens, len(slots) * tokens, tokens), y_IXD[0::2], y_IXD[1::2]
        if isinstance(rotary, HeadRotary):
            for head, one in enumerate(rotary.heads):
                alone = slice(head, head + 1)
                heads = of_head(keys, head), of_head(values, head)
                turn((y1_HXD[alone], y2_HXD[alone]), back_HEE[alone], one, *heads, span)
        else:
            turn((y1_HXD, y2_HXD), back_HEE, rotary, keys, values, span)


def of_head(target: Target, head: int) -> Target:
    """That of one head alone, as views."""
    out_HXD, scaling = target
    return out_HXD[head : head + 1], None if scaling is None else scaling.of_head(head)


def components(k_THD: Tensor, v_THD: Tensor, turn_HEE: Tensor) -> Tensor:
    """Keys and values of a block to components, [T, H, E] of their type, which is one of 2 bytes."""
    k_THD, v_THD = (x if x.stride(2) == 1 else x.contiguous() for x in (k_THD, v_THD))
    tokens, num_heads, dim = k_THD.shape
    y_THE = torch.empty((tokens, num_heads, 2 * dim), dtype=k_THD.dtype, device=k_THD.device)
    y_HTE = y_THE.transpose(0, 1)
    rows = k_THD.transpose(0, 1), v_THD.transpose(0, 1)
    matrix_HEE, span = turn_HEE.to(k_THD.dtype), (0, tokens, tokens)
    turn(rows, matrix_HEE, None, (y_HTE[..., :dim], None), (y_HTE[..., dim:], None), span)
    return y_THE
