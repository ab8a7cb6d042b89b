"""Attention over int8 keys and e4m3 values on Hopper, with log-sum-exp: attention_fp8.py's kernel in Gluon.

What attention_fp8_triton.py does by tiles of 64 queries reads every key and value 74 times for 4,680 of them, and was
bound by that: 5 TB/s out of L2 on an H200. Here a program takes 128 queries past the same keys:

    warps 0-3    queries  0 ..  63 ┐  each: S = Q.K in int32 -> float, times the keys' scales -> P, e4m3 -> O += P.V
    warps 4-7    queries 64 .. 127 ┘  one's softmax runs while the other's matrix product does
    warp  8      asks TMA for the next keys and values, STAGES steps ahead

O is summed in float32, outside the tensor cores, whose FP8 sums keep about 14 bits. Int8 sums are exact. Two splits of
many keys, merged by log-sum-exp, fill the GPU's last round of programs better (attention_fp8.hopper_splits). Source for
the roles of the warps: Shah et al., FlashAttention-3 (arXiv 2407.08608).

Shape legend: H heads, T query tokens, X key tokens, D head dim, BN keys of a step, S splits.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longtake.kernels.attention import merge
from longtake.kernels.attention_fp8 import hopper_splits
from longtake.kernels.attention_fp8_triton import quantise_each
from longtake.kernels.scaling import Scaling

P_SHIFT = gl.constexpr(8.0)  # as in attention_fp8.py
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634
HALF = gl.constexpr(64)  # queries of four warps
ROWS = 128  # of a program
WARPS = 4  # that the kernel is built for; the others are asked for inside


@dataclass(frozen=True, slots=True, kw_only=True)
class HopperLaunch:
    """How attention is cut.

    Args:
        columns: keys of a step.
        stages: steps of keys and values held in shared memory.
        splits: of the keys, 1 or 2; None: attention_fp8.hopper_splits.
        registers: of a thread that multiplies.
    """

    columns: int = 128
    stages: int = 3
    splits: int | None = None
    registers: int = 232


DEFAULT_LAUNCH = HopperLaunch()


@gluon.jit
def produce(
    k_desc, v_desc, k_bufs, v_bufs, k_ready, k_free, v_ready, v_free, k_line, v_line, first, last,
    BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Steps first .. last of keys and values into shared memory, each when its place is free."""
    BYTES: gl.constexpr = BN * k_desc.block_type.shape[1]
    for step in range(first, last):
        slot = (step - first) % STAGES
        phase = ((step - first) // STAGES) & 1
        mbarrier.wait(k_free.index(slot), phase ^ 1)
        mbarrier.expect(k_ready.index(slot), BYTES)
        tma.async_copy_global_to_shared(k_desc, [k_line + step * BN, 0], k_ready.index(slot), k_bufs.index(slot))
        mbarrier.wait(v_free.index(slot), phase ^ 1)
        mbarrier.expect(v_ready.index(slot), BYTES)
        tma.async_copy_global_to_shared(v_desc, [v_line, step * BN], v_ready.index(slot), v_bufs.index(slot))


@gluon.jit
def consume(
    q_buf, k_bufs, v_bufs, q_ready, k_ready, k_free, v_ready, v_free, q_scale, k_scale, shift, v_scale, v_centre,
    out, lse, stride_ot, first_query, num_queries, num_keys, first, last, softmax_scale,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 queries of a head past steps first .. last of its keys; pointers are the head's."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    query = first_query + gl.arange(0, HALF, layout=s_rows)
    live = query < num_queries
    scale = gl.load(q_scale + query, mask=live, other=1.0) * softmax_scale
    key = gl.arange(0, BN, layout=gl.SliceLayout(0, s_layout))
    top = gl.full([HALF], float("-inf"), gl.float32, layout=s_rows)
    total = gl.zeros([HALF], gl.float32, layout=s_rows)
    acc = gl.zeros([HALF, D], gl.float32, layout=o_layout)
    no_score = gl.zeros([HALF, BN], gl.int32, layout=s_layout)
    no_part = gl.zeros([HALF, D], gl.float32, layout=o_layout)
    mbarrier.wait(q_ready, 0)
    for step in range(first, last):
        slot = (step - first) % STAGES
        phase = ((step - first) // STAGES) & 1
        left = num_keys - step * BN
        if left >= BN:
            key_scale = gl.load(k_scale + step * BN + key)
        else:
            key_scale = gl.load(k_scale + step * BN + key, mask=key < left, other=0.0)
        mbarrier.wait(k_ready.index(slot), phase)
        k_tile = k_bufs.index(slot).permute((1, 0))
        pending = warpgroup_mma(q_buf, k_tile, no_score, use_acc=False, is_async=True)
        codes = warpgroup_mma_wait(0, deps=(pending,))
        mbarrier.arrive(k_free.index(slot))
        score = codes.to(gl.float32) * key_scale[None, :]
        if left < BN:
            score = gl.where((key < left)[None, :], score, float("-inf"))
        new_top = gl.maximum(top, gl.max(score, 1) * scale)
        p = gl.exp2(score * scale[:, None] - (new_top - P_SHIFT)[:, None])
        alpha = gl.exp2(top - new_top)
        total = total * alpha + gl.sum(p, 1)
        top = new_top
        p8 = gl.convert_layout(p.to(gl.float8e4nv), p_layout)
        mbarrier.wait(v_ready.index(slot), phase)
        v_tile = v_bufs.index(slot).permute((1, 0))
        pending = warpgroup_mma(p8, v_tile, no_part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=(pending,))
        mbarrier.arrive(v_free.index(slot))
        acc = acc * gl.convert_layout(alpha, o_rows)[:, None] + part
    gl.store(lse + query, (top - P_SHIFT + gl.log2(total)) * LN2 + gl.load(shift + query, mask=live, other=0.0), live)
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    weight = gl.convert_layout(gl.load(v_scale) / total, o_rows)
    result = acc * weight[:, None] + gl.load(v_centre + channel)[None, :]
    query = first_query + gl.arange(0, HALF, layout=o_rows)
    place = out + query.to(gl.int64)[:, None] * stride_ot + channel[None, :]
    gl.store(place, result.to(out.dtype.element_ty), mask=(query < num_queries)[:, None])


@gluon.jit(do_not_specialize=["num_queries", "num_keys"])  # a history grows: one build serves all
def attend_kernel(
    q_desc, k_desc, v_desc, q_scale, k_scale, shift, v_scale, v_centre, out, lse, stride_os, stride_oh, stride_ot,
    num_heads, num_queries, num_keys, rows, softmax_scale,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """128 queries of one head past one split of the keys."""
    tiles = gl.cdiv(num_queries, 2 * HALF)
    tile = gl.program_id(0) % (tiles * num_heads)
    split = gl.program_id(0) // (tiles * num_heads)
    head = (tile // tiles).to(gl.int64)
    first_query = tile % tiles * (2 * HALF)
    steps = gl.cdiv(num_keys, BN)
    share = gl.cdiv(steps, SPLITS)
    first = split * share
    last = gl.minimum(first + share, steps)
    line = head * num_queries

    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [2, HALF, D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, D, BN], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)  # both halves have read it
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()  # TMA is to find the barriers ready
    mbarrier.expect(q_ready.index(0), 2 * HALF * D)
    q_line = (line + first_query).to(gl.int32)
    tma.async_copy_global_to_shared(q_desc, [q_line, 0], q_ready.index(0), q_bufs.index(0))
    tma.async_copy_global_to_shared(q_desc, [q_line + HALF, 0], q_ready.index(0), q_bufs.index(1))

    k_line, v_line = (head * rows).to(gl.int32), (head * D).to(gl.int32)
    lse += (split * num_heads + head) * num_queries
    out += split.to(gl.int64) * stride_os + head * stride_oh
    q_scale += line
    shift += line
    k_scale += head * rows
    v_scale += head
    v_centre += head * D
    gl.warp_specialize(
        [
            (consume, (q_bufs.index(0), k_bufs, v_bufs, q_ready.index(0), k_ready, k_free, v_ready, v_free, q_scale,
                       k_scale, shift, v_scale, v_centre, out, lse, stride_ot, first_query, num_queries, num_keys,
                       first, last, softmax_scale, D, BN, STAGES)),
            (consume, (q_bufs.index(1), k_bufs, v_bufs, q_ready.index(0), k_ready, k_free, v_ready, v_free, q_scale,
                       k_scale, shift, v_scale, v_centre, out, lse, stride_ot, first_query + HALF, num_queries,
                       num_keys, first, last, softmax_scale, D, BN, STAGES)),
            (produce, (k_desc, v_desc, k_bufs, v_bufs, k_ready, k_free, v_ready, v_free, k_line, v_line, first, last,
                       BN, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 40],
    )  # fmt: skip


def layout_of(num_columns: int) -> gl.NVMMASharedLayout:
    """Of 8-bit rows in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(num_columns, 128), element_bitwidth=8, rank=2)


def attend(
    q_HTD: Tensor,
    k_HXD: Tensor,
    v_HXD: Tensor,
    k_scaling: Scaling,
    v_scaling: Scaling,
    num_keys: int,
    launch: HopperLaunch = DEFAULT_LAUNCH,
) -> tuple[Tensor, Tensor]:
    """As attention_fp8_triton.attend, for int8 keys and e4m3 values with tokens contiguous."""
    num_heads, num_queries, dim = q_HTD.shape
    device, rows = q_HTD.device, k_HXD.shape[1]
    splits = hopper_splits(num_keys) if launch.splits is None else launch.splits
    assert k_scaling.rows_HX is not None and v_HXD.stride(1) == 1, "int8 keys and turned values"
    out_STHD = torch.empty((splits, num_queries, num_heads, dim), dtype=q_HTD.dtype, device=device)
    lse_SHT = torch.empty((splits, num_heads, num_queries), dtype=torch.float32, device=device)
    q8_HTD, q_scale_HT, shift_HT = quantise_each(q_HTD, k_scaling.centre_HD, torch.int8)
    narrow, wide = layout_of(dim), layout_of(launch.columns)
    q_desc = TensorDescriptor(q8_HTD, [num_heads * num_queries, dim], [dim, 1], [HALF.value, dim], narrow)
    k_desc = TensorDescriptor(k_HXD, [num_heads * rows, dim], [dim, 1], [launch.columns, dim], narrow)
    # rows not in use may be NaN: beyond num_keys TMA fills in zeros
    v_desc = TensorDescriptor(v_HXD, [num_heads * dim, num_keys], [rows, 1], [dim, launch.columns], wide)
    attend_kernel[(splits * num_heads * triton.cdiv(num_queries, ROWS),)](
        q_desc, k_desc, v_desc, q_scale_HT, k_scaling.rows_HX, shift_HT, v_scaling.scale_H, v_scaling.centre_HD,
        out_STHD, lse_SHT, out_STHD.stride(0), out_STHD.stride(2), out_STHD.stride(1),
        num_heads, num_queries, num_keys, rows, dim**-0.5 * LOG2E,
        D=dim, BN=launch.columns, STAGES=launch.stages, SPLITS=splits, REGISTERS=launch.registers, num_warps=WARPS,
    )  # fmt: skip
    parts = [(out.transpose(0, 1), lse) for out, lse in zip(out_STHD, lse_SHT, strict=True)]
    return parts[0] if splits == 1 else merge(*parts[0], *parts[1])
