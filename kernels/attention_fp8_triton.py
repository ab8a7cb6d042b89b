"""Attention over FP8 keys and values, with log-sum-exp: the Triton kernels behind attention_fp8.py.

One program takes BM queries of one head past all its keys, BN at a time, in the way of FlashAttention: scores in base
2, a running maximum, P rounded to e4m3 after scaling by 2^8 (e4m3 reaches from 2^-9 to 448, so weights down to 2^-17
of the largest survive). Queries are rounded to e4m3 by a small kernel before, each with its own scale.

The work, (tiles of queries) x (steps along keys), may also be dealt evenly to any number of programs ("stream-K"): a
program then starts and ends inside a tile, writes those two results apart, and `join_kernel` merges them. That removes
the last, partly filled wave: 12 heads x 74 tiles do not divide by 132 multiprocessors.

    unit:       0 .. steps | steps .. 2*steps | 2*steps .. 3*steps      a tile is `steps` units
    program:    |---- 0 ----|------ 1 ------|------ 2 ------|           begin(p) = p * units // programs

Shape legend: H heads, T query tokens, X key tokens, D head dim, BM, BN rows and columns of a tile of scores.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.scaling import Scaling

P_SHIFT = tl.constexpr(8.0)
LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendLaunch:
    """How the attention kernel is cut and compiled; what is fastest is found by measuring.

    Args:
        rows: queries of a tile (BM).
        columns: keys of a step (BN).
        warps: of a program.
        stages: of the software pipeline.
        programs_per_sm: programs for each multiprocessor that share the work evenly; 0 gives each tile its own.
        tma: load K and V through tensor-map descriptors.
        warp_specialize: ask the compiler to split loads and arithmetic among warps.
        wide_sum: add each step's P.V to the output in float32 instead of inside the tensor core, whose FP8 sums
            keep about 14 bits.
        ahead: start the next step's scores before this step's softmax, so that both run at once.
    """

    rows: int = 64
    columns: int = 128
    warps: int = 4
    stages: int = 3
    programs_per_sm: int = 0
    tma: bool = False
    warp_specialize: bool = False
    wide_sum: bool = True
    ahead: bool = False


DEFAULT_ATTEND = AttendLaunch()
QUERY_ROWS = 32


@triton.jit
def load_rows(x, head, start, num_keys, stride_h, stride_x, D: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """Rows start .. start + BN of a head, [BN, D]; channels are contiguous."""
    if TMA:
        tile = x.load([(head * (stride_h // stride_x) + start).to(tl.int32), 0])
    else:
        key = start + tl.arange(0, BN)
        place = x + head.to(tl.int64) * stride_h + key.to(tl.int64)[:, None] * stride_x + tl.arange(0, D)[None, :]
        if MASKED:  # noqa: SIM108
            tile = tl.load(place, mask=(key < num_keys)[:, None], other=0.0)
        else:
            tile = tl.load(place)
    return tile


@triton.jit
def load_turned(x, head, start, num_keys, stride_h, stride_d, D: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
                MASKED: tl.constexpr):  # fmt: skip
    """Rows start .. start + BN of a head, [BN, D]; tokens are contiguous."""
    if TMA:
        tile = x.load([(head * D).to(tl.int32), start])
    else:
        key = start + tl.arange(0, BN)
        place = x + head.to(tl.int64) * stride_h + tl.arange(0, D)[:, None] * stride_d + key.to(tl.int64)[None, :]
        if MASKED:  # noqa: SIM108
            tile = tl.load(place, mask=(key < num_keys)[None, :], other=0.0)
        else:
            tile = tl.load(place)
    return tl.trans(tile)


@triton.jit
def load_v(v, head, start, num_keys, stride_h, stride_d, stride_x, D: tl.constexpr, BN: tl.constexpr,
           TMA: tl.constexpr, TURNED: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Values start .. start + BN of a head, [BN, D]."""
    if TURNED:
        tile = load_turned(v, head, start, num_keys, stride_h, stride_d, D, BN, TMA, MASKED)
    else:
        tile = load_rows(v, head, start, num_keys, stride_h, stride_x, D, BN, TMA, MASKED)
    return tile


@triton.jit
def quantise_queries_kernel(
    q, k_centre, q8, q_scale, shift, stride_qh, stride_qt, stride_oh, stride_ot, num_queries, softmax_scale,
    D: tl.constexpr, ROWS: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    """ROWS queries of a head to e4m3, and what K's centre takes from their scores; q_scale [H] is given with BY_HEAD,
    otherwise each query gets one, [H, T]."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < num_queries
    column = tl.arange(0, D)
    place = q + head * stride_qh + row.to(tl.int64)[:, None] * stride_qt + column[None, :]
    tile = tl.load(place, mask=live[:, None], other=0.0).to(tl.float32)
    moved = tl.sum(tile * tl.load(k_centre + head * D + column)[None, :], 1) * softmax_scale
    tl.store(shift + head * num_queries + row, moved, mask=live)
    if BY_HEAD:
        tile = tile * (1.0 / tl.load(q_scale + head))
    else:
        largest = tl.max(tl.abs(tile), 1)
        scale = tl.where(largest > 0, largest * (1.0 / 448.0), 1.0)
        tl.store(q_scale + head * num_queries + row, scale, mask=live)
        tile = tile / scale[:, None]
    tile = tl.minimum(tl.maximum(tile, -448.0), 448.0)
    out = q8 + head * stride_oh + row.to(tl.int64)[:, None] * stride_ot + column[None, :]
    tl.store(out, tile.to(tl.float8e4nv), mask=live[:, None])


@triton.jit
def update(acc, top, total, score, scale, v_tile, P_TYPE: tl.constexpr, PV_DOT: tl.constexpr, WIDE: tl.constexpr):
    """Take one tile of scores into the running output, maximum and sum. scale is [BM]: of scores, in base 2."""
    new_top = tl.maximum(top, tl.max(score, 1) * scale)
    p = tl.math.exp2(score * scale[:, None] - (new_top - P_SHIFT)[:, None])
    alpha = tl.math.exp2(top - new_top)
    total = total * alpha + tl.sum(p, 1)
    p_cast = p.to(P_TYPE).to(PV_DOT)
    if WIDE:
        acc = acc * alpha[:, None] + tl.dot(p_cast, v_tile.to(PV_DOT))
    else:
        acc = tl.dot(p_cast, v_tile.to(PV_DOT), acc * alpha[:, None])
    return acc, new_top, total


@triton.jit
def attend_tile(
    q8, q_scale, shift, k, v, k_scale, v_scale, v_centre, out, lse, part, part_lse,
    stride_kh, stride_kx, stride_vh, stride_vd, stride_vx, stride_oh, stride_ot,
    num_queries, num_keys, softmax_scale, tile, low, high, slot,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TURNED: tl.constexpr, P_TYPE: tl.constexpr,
    DOT: tl.constexpr, PV_DOT: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr, WIDE: tl.constexpr,
    AHEAD: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Steps low .. high of one tile of queries; a whole tile's result goes to out, a part's to slot of part."""
    steps = tl.cdiv(num_keys, BN)
    full_steps = num_keys // BN
    tiles = tl.cdiv(num_queries, BM)
    full_high = tl.minimum(high, full_steps)
    head = tile // tiles
    row = tile % tiles * BM + tl.arange(0, BM)
    live = row < num_queries
    column = tl.arange(0, D)
    line = head.to(tl.int64) * num_queries + row
    q_tile = tl.load(q8 + line[:, None] * D + column[None, :], mask=live[:, None], other=0.0).to(DOT)
    scale = tl.load(q_scale + line, mask=live, other=1.0)
    scale = scale * (tl.load(k_scale + head) * (softmax_scale * 1.4426950408889634))

    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    if AHEAD:
        if low < full_high:
            k_tile = load_rows(k, head, low * BN, num_keys, stride_kh, stride_kx, D, BN, TMA, False)
            score = tl.dot(q_tile, tl.trans(k_tile).to(DOT))
            for i in tl.range(low, full_high - 1, num_stages=STAGES, warp_specialize=SPECIALIZE):
                k_tile = load_rows(k, head, i * BN + BN, num_keys, stride_kh, stride_kx, D, BN, TMA, False)
                v_tile = load_v(v, head, i * BN, num_keys, stride_vh, stride_vd, stride_vx, D, BN, TMA, TURNED, False)
                next_score = tl.dot(q_tile, tl.trans(k_tile).to(DOT))
                acc, top, total = update(acc, top, total, score, scale, v_tile, P_TYPE, PV_DOT, WIDE)
                score = next_score
            start = (full_high - 1) * BN
            v_tile = load_v(v, head, start, num_keys, stride_vh, stride_vd, stride_vx, D, BN, TMA, TURNED, False)
            acc, top, total = update(acc, top, total, score, scale, v_tile, P_TYPE, PV_DOT, WIDE)
    else:
        for i in tl.range(low, full_high, num_stages=STAGES, warp_specialize=SPECIALIZE):
            k_tile = load_rows(k, head, i * BN, num_keys, stride_kh, stride_kx, D, BN, TMA, False)
            v_tile = load_v(v, head, i * BN, num_keys, stride_vh, stride_vd, stride_vx, D, BN, TMA, TURNED, False)
            score = tl.dot(q_tile, tl.trans(k_tile).to(DOT))
            acc, top, total = update(acc, top, total, score, scale, v_tile, P_TYPE, PV_DOT, WIDE)
    if high > full_steps:
        start = full_steps * BN
        k_tile = load_rows(k, head, start, num_keys, stride_kh, stride_kx, D, BN, TMA, True)
        v_tile = load_v(v, head, start, num_keys, stride_vh, stride_vd, stride_vx, D, BN, TMA, TURNED, True)
        used = start + tl.arange(0, BN) < num_keys
        if TMA and not TURNED:  # tensor maps end with the scratch, and 0 x NaN of an unused row is NaN
            v_tile = tl.where(used[:, None], v_tile, 0.0)
        score = tl.dot(q_tile, tl.trans(k_tile).to(DOT))
        score = tl.where(used[None, :], score, float("-inf"))
        acc, top, total = update(acc, top, total, score, scale, v_tile, P_TYPE, PV_DOT, WIDE)
    if TURNED:
        weight = tl.load(v_scale + head) / total
        result = acc * weight[:, None] + tl.load(v_centre + head * D + column)[None, :]
    else:
        result = acc / total[:, None]
    result_lse = (top - P_SHIFT + tl.math.log2(total)) * LN2 + tl.load(shift + line, mask=live, other=0.0)
    if WHOLE or ((low == 0) & (high == steps)):
        place = out + head.to(tl.int64) * stride_oh + row.to(tl.int64)[:, None] * stride_ot + column[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=live[:, None])
        tl.store(lse + line, result_lse, mask=live)
    else:
        part_line = slot * BM + tl.arange(0, BM)
        tl.store(part + part_line[:, None] * D + column[None, :], result)
        tl.store(part_lse + part_line, result_lse)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])  # a history grows: one build serves all
def attend_kernel(
    q8, q_scale, shift, k, v, k_scale, v_scale, v_centre, out, lse, part, part_lse,
    stride_kh, stride_kx, stride_vh, stride_vd, stride_vx, stride_oh, stride_ot,
    num_heads, num_queries, num_keys, softmax_scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TURNED: tl.constexpr, P_TYPE: tl.constexpr,
    DOT: tl.constexpr, PV_DOT: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr, WIDE: tl.constexpr,
    AHEAD: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of queries; with SPLIT, this program's share of all (tile, step) units."""
    steps = tl.cdiv(num_keys, BN)
    program = tl.program_id(0)
    if SPLIT:
        units = tl.cast(num_heads, tl.int64) * tl.cdiv(num_queries, BM) * steps
        begin = program.to(tl.int64) * units // tl.num_programs(0)
        end = (program.to(tl.int64) + 1) * units // tl.num_programs(0)
        first_tile = (begin // steps).to(tl.int32)
        for tile in range(first_tile, tl.cdiv(end, steps).to(tl.int32)):
            low = tl.maximum(begin - tl.cast(tile, tl.int64) * steps, 0).to(tl.int32)
            high = tl.minimum(end - tl.cast(tile, tl.int64) * steps, steps).to(tl.int32)
            attend_tile(
                q8, q_scale, shift, k, v, k_scale, v_scale, v_centre, out, lse, part, part_lse,
                stride_kh, stride_kx, stride_vh, stride_vd, stride_vx, stride_oh, stride_ot,
                num_queries, num_keys, softmax_scale, tile, low, high, program * 2 + (tile > first_tile).to(tl.int32),
                D, BM, BN, TURNED, P_TYPE, DOT, PV_DOT, TMA, SPECIALIZE, WIDE, AHEAD, STAGES, False,
            )  # fmt: skip
    else:
        attend_tile(
            q8, q_scale, shift, k, v, k_scale, v_scale, v_centre, out, lse, part, part_lse,
            stride_kh, stride_kx, stride_vh, stride_vd, stride_vx, stride_oh, stride_ot,
            num_queries, num_keys, softmax_scale, program, 0, steps, 0,
            D, BM, BN, TURNED, P_TYPE, DOT, PV_DOT, TMA, SPECIALIZE, WIDE, AHEAD, STAGES, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys", "programs"])
def join_kernel(
    part, part_lse, out, lse, stride_oh, stride_ot, num_heads, num_queries, num_keys, programs,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one tile that several programs shared; ROWS of its BM rows."""
    steps = tl.cdiv(num_keys, BN)
    tiles = tl.cdiv(num_queries, BM)
    tile = tl.program_id(0)
    units = tl.cast(num_heads, tl.int64) * tiles * steps
    first = (((tl.cast(tile, tl.int64) * steps + 1) * programs - 1) // units).to(tl.int32)
    last = (((tl.cast(tile, tl.int64) + 1) * steps * programs - 1) // units).to(tl.int32)
    if first < last:
        head = tile // tiles
        inside = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        row = tile % tiles * BM + inside
        live = row < num_queries
        column = tl.arange(0, D)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, D), tl.float32)
        for program in range(first, last + 1):
            begun_in = tl.cast(program, tl.int64) * units // programs // steps
            line = (tl.cast(program, tl.int64) * 2 + (tile > begun_in).to(tl.int32)) * BM + inside
            part_of = tl.load(part_lse + line)
            new_top = tl.maximum(top, part_of)
            alpha, share = tl.exp(top - new_top), tl.exp(part_of - new_top)
            acc = acc * alpha[:, None] + tl.load(part + line[:, None] * D + column[None, :]) * share[:, None]
            total = total * alpha + share
            top = new_top
        place = out + head.to(tl.int64) * stride_oh + row.to(tl.int64)[:, None] * stride_ot + column[None, :]
        tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=live[:, None])
        tl.store(lse + head.to(tl.int64) * num_queries + row, top + tl.log(total), mask=live)


def quantise_queries(q_HTD: Tensor, scale_H: Tensor, k_centre_HD: Tensor) -> tuple[Tensor, Tensor]:
    """Triton twin of flash3.quantise_reference.

    Args:
        q_HTD: [H, T, D] any float type, D 64 or 128, channels contiguous.
        scale_H: float32 [H], powers of two.
        k_centre_HD: float32 [H, D].

    Returns:
        e4m3 [H, T, D] (a view of [T, H, D]) and the shift, float32 [H, T].
    """
    num_heads, num_queries, dim = q_HTD.shape
    q8_HTD = torch.empty((num_queries, num_heads, dim), dtype=torch.float8_e4m3fn, device=q_HTD.device).transpose(0, 1)
    shift_HT = torch.empty((num_heads, num_queries), dtype=torch.float32, device=q_HTD.device)
    quantise_queries_kernel[(triton.cdiv(num_queries, QUERY_ROWS), num_heads)](
        q_HTD, k_centre_HD, q8_HTD, scale_H, shift_HT, q_HTD.stride(0), q_HTD.stride(1), q8_HTD.stride(0),
        q8_HTD.stride(1), num_queries, dim**-0.5, D=dim, ROWS=QUERY_ROWS, BY_HEAD=True,
    )  # fmt: skip
    return q8_HTD, shift_HT


def split_programs(launch: AttendLaunch, device: torch.device) -> int:
    """Programs that share the work on a device; 0 if each tile has its own."""
    if device.type != "cuda" or not launch.programs_per_sm:
        return 0
    return launch.programs_per_sm * torch.cuda.get_device_properties(device).multi_processor_count


def part_elements(num_programs: int, rows: int, dim: int) -> int:
    """float32 elements of the workspace for split tiles: outputs, then log-sum-exps."""
    return num_programs * 2 * rows * (dim + 1)


def attend(
    q_HTD: Tensor, k_HXD: Tensor, v_HXD: Tensor, k_scaling: Scaling, v_scaling: Scaling, num_keys: int,
    launch: AttendLaunch = DEFAULT_ATTEND, *, num_programs: int | None = None, part: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Triton twin of attention_fp8.attend_reference.

    Args:
        q_HTD: [H, T, D] bfloat16, float16 or float32; channels contiguous.
        k_HXD: e4m3 [H, X, D], channels contiguous.
        v_HXD: e4m3 [H, X, D], tokens contiguous, or bfloat16, channels contiguous.
        k_scaling, v_scaling: what they were stored with; v_scaling is for e4m3 only.
        num_keys: rows in use, at least 1.
        launch: tile sizes and variants.
        num_programs: instead of the launch's programs_per_sm.
        part: float32 [>= part_elements(...)], workspace when tiles are split; allocated if it is not given.

    Returns:
        out_HTD of q's dtype (a view of [T, H, D]), lse_HT float32.
    """
    num_heads, num_queries, dim = q_HTD.shape
    turned = v_HXD.dtype == torch.float8_e4m3fn
    out_HTD = torch.empty((num_queries, num_heads, dim), dtype=q_HTD.dtype, device=q_HTD.device).transpose(0, 1)
    lse_HT = torch.empty((num_heads, num_queries), dtype=torch.float32, device=q_HTD.device)
    tiles = num_heads * triton.cdiv(num_queries, launch.rows)
    programs = num_programs or split_programs(launch, q_HTD.device) or tiles
    split = programs != tiles
    if part is None or not split:
        needed = part_elements(programs, launch.rows, dim) if split else 0
        part = torch.empty(needed, dtype=torch.float32, device=q_HTD.device)
    part_lse = part[programs * 2 * launch.rows * dim :] if split else part
    k_arg, v_arg = (k_HXD, v_HXD) if not launch.tma else _descriptors(k_HXD, v_HXD, num_keys, launch.columns)
    dot = tl.float8e4nv if q_HTD.is_cuda else tl.float32  # the interpreter multiplies small types wrongly
    q8_HTD = torch.empty((num_heads, num_queries, dim), dtype=torch.float8_e4m3fn, device=q_HTD.device)
    q_scale_HT, shift_HT = torch.empty_like(lse_HT), torch.empty_like(lse_HT)
    quantise_queries_kernel[(triton.cdiv(num_queries, QUERY_ROWS), num_heads)](
        q_HTD, k_scaling.centre_HD, q8_HTD, q_scale_HT, shift_HT, q_HTD.stride(0), q_HTD.stride(1), q8_HTD.stride(0),
        q8_HTD.stride(1), num_queries, dim**-0.5, D=dim, ROWS=QUERY_ROWS, BY_HEAD=False,
    )  # fmt: skip
    attend_kernel[(programs,)](
        q8_HTD, q_scale_HT, shift_HT, k_arg, v_arg, k_scaling.scale_H, v_scaling.scale_H, v_scaling.centre_HD, out_HTD,
        lse_HT, part, part_lse, k_HXD.stride(0), k_HXD.stride(1), v_HXD.stride(0), v_HXD.stride(2), v_HXD.stride(1),
        out_HTD.stride(0), out_HTD.stride(1), num_heads, num_queries, num_keys, dim**-0.5,
        D=dim, BM=launch.rows, BN=launch.columns, TURNED=turned, P_TYPE=tl.float8e4nv if turned else tl.bfloat16,
        DOT=dot, PV_DOT=dot if turned or not q_HTD.is_cuda else tl.bfloat16, TMA=launch.tma,
        SPECIALIZE=launch.warp_specialize, WIDE=launch.wide_sum, AHEAD=launch.ahead, STAGES=launch.stages, SPLIT=split,
        num_warps=launch.warps,
    )  # fmt: skip
    if split:
        join_kernel[(tiles, 2)](
            part, part_lse, out_HTD, lse_HT, out_HTD.stride(0), out_HTD.stride(1), num_heads, num_queries, num_keys,
            programs, D=dim, BM=launch.rows, BN=launch.columns, ROWS=launch.rows // 2,
        )  # fmt: skip
    return out_HTD, lse_HT


def _descriptors(k_HXD: Tensor, v_HXD: Tensor, num_keys: int, columns: int) -> tuple[object, object]:
    """Tensor maps of K and V as matrices: rows of all heads one after the other (the scratch is contiguous)."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    heads, rows, dim = k_HXD.shape
    k_map = TensorDescriptor(k_HXD, [heads * rows, dim], [dim, 1], [columns, dim])
    if v_HXD.dtype == torch.float8_e4m3fn:
        return k_map, TensorDescriptor(v_HXD.mT, [heads * dim, num_keys], [v_HXD.stride(2), 1], [dim, columns])
    return k_map, TensorDescriptor(v_HXD, [heads * rows, dim], [dim, 1], [columns, dim])
