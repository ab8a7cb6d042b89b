"""Triton twin of dense.py's materialise: a strided copy out of the arena, with RoPE for keys.

Encoding needs no kernel: it is one strided copy.

Shape legend: T tokens of a block, H heads, D head dim, R rows of a tile, N blocks read.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.kernels.arena_triton import DEFAULT_LAUNCH, Launch, reading
from longtake.kernels.rotary import Rotary
from longtake.kernels.rotary_triton import turns
from longtake.kernels.scaling import Scaling
from longtake.kernels.scaling_triton import emit

if TYPE_CHECKING:
    from longtake.kernels.dense import DenseCodec


@triton.jit
def materialise_kernel(
    pages, slots, temporal, spatial, out, centre, scale,
    stride_slot, stride_page, stride_oh, stride_ox, stride_od, tokens, tokens_per_frame,
    D: tl.constexpr, PT: tl.constexpr, STORED: tl.constexpr, SCALED: tl.constexpr, TURNED: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Copy ROWS tokens of one block for HEADS heads; turn them unless PT is 0."""
    block = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tokens // ALIGN * ALIGN  # the same number, seen to be aligned
    column = tl.arange(0, D)[None, :]
    if PT:
        frame = block * (tokens // tokens_per_frame) + row // tokens_per_frame
        cos, sin = turns(temporal, spatial, frame, row % tokens_per_frame, live, D, PT, ROWS, 0, D)
    slot = pages + tl.load(slots + block).to(tl.int64) * stride_slot
    target = block.to(tl.int64) * (tokens // ALIGN * ALIGN) + row
    for i in range(HEADS):
        head = tl.program_id(2) * HEADS + i
        section = (slot + head * stride_page).to(tl.pointer_type(STORED))
        tile = tl.load(section + row[:, None] * D + column, mask=live[:, None], other=0.0).to(tl.float32)
        if PT:
            real, imag = tl.split(tl.reshape(tile, (ROWS, D // 2, 2)))
            tile = tl.reshape(tl.join(real * cos - imag * sin, real * sin + imag * cos), (ROWS, D))
        emit(tile, out, head, target, live, stride_oh, stride_ox, stride_od, centre, scale, D, SCALED, TURNED)


def materialise(
    sections_GHB: Tensor,
    slots_N: Tensor,
    rotary: Rotary | None,
    out_HXD: Tensor,
    codec: DenseCodec,
    scaling: Scaling | None = None,
    launch: Launch = DEFAULT_LAUNCH,
) -> None:
    """Copy the slots' sections into N*T rows of each head, turned if tables are given, scaled for e4m3."""
    num_heads, dim = out_HXD.shape[0], out_HXD.shape[2]
    tokens = codec.geometry.num_tokens
    arguments, constants = reading(sections_GHB, slots_N, rotary, out_HXD, scaling, tokens)
    stored = tl.bfloat16 if codec.dtype == torch.bfloat16 else tl.float32
    materialise_kernel[launch.grid(tokens, slots_N.shape[0], num_heads)](
        *arguments,
        D=dim, STORED=stored,
        **constants, **launch.sizes(num_heads),
    )  # fmt: skip
