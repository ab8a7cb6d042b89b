"""Exchanges as plain stores into the other ranks' memory: what is sent lies where it will be read.

Ulysses: each program copies some rows of one head to the rank that wants them, without packing before or reordering
after, as a collective needs. Tensor parallelism: a part for each rank, or one for all, and the sum of what came.
Whoever reads waits until all have written (engine/peer_exchange.py). Tokens are dealt to ranks as engine/ulysses.py
says.

Shape legend: n ranks along sp or tp, m ranks along tp that split tokens too, F latent frames, S tokens of a latent
frame, s those of a share, t = F*s, T = F*S, H heads before the exchange, h = H/n after it, D head dim.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, WARPS = 64, 8
WORDS, ELEMENTS = 4096, 2048  # of a program


@triton.jit
def whole_token(row, rank, m: tl.constexpr, F: tl.constexpr, S: tl.constexpr, s: tl.constexpr):
    """Of the rows of a rank's shares: which are tokens, not padding; and their place among all tokens."""
    within = (rank * m + row // (F * s)) * s + row % s
    return (row < m * F * s) & (within < S), row // s % F * S + within


@triton.jit
def to_heads_kernel(
    q, k, v, buffers, rank, stride_t, stride_h,
    m: tl.constexpr, F: tl.constexpr, S: tl.constexpr, s: tl.constexpr, h: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of one head of q, k or v [m*t, H, D] into the [3, T, h, D] of the rank that attends it."""
    row, head, which = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.program_id(2)
    live, token = whole_token(row, rank, m, F, S, s)
    channel = tl.arange(0, D)[None, :]
    source = q
    if which == 1:
        source = k
    if which == 2:
        source = v
    rows = tl.load(source + row[:, None].to(tl.int64) * stride_t + head * stride_h + channel, mask=live[:, None])
    target = tl.multiple_of(tl.load(buffers + head // h).to(tl.pointer_type(q.dtype.element_ty)), 16)
    target += ((which * (F * S) + token) * h + head % h)[:, None] * D + channel
    tl.store(target, rows, mask=live[:, None])


@triton.jit
def to_tokens_kernel(
    out, buffers, rank, stride_t, stride_h,
    m: tl.constexpr, F: tl.constexpr, S: tl.constexpr, s: tl.constexpr, h: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of one head of attention's result [T, h, D] into the [m*t, H, D] of the rank whose tokens they are."""
    row, head, peer = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.program_id(2)
    live, token = whole_token(row, peer, m, F, S, s)
    channel = tl.arange(0, D)[None, :]
    rows = tl.load(out + token[:, None].to(tl.int64) * stride_t + head * stride_h + channel, mask=live[:, None])
    target = tl.multiple_of(tl.load(buffers + peer).to(tl.pointer_type(out.dtype.element_ty)), 16)
    target += (row * (tl.num_programs(2) * h) + rank * h + head)[:, None] * D + channel
    tl.store(target, rows, mask=live[:, None])


@triton.jit
def spread_kernel(x, buffers, words, stride, place, WORDS: tl.constexpr):
    """Words x[peer * stride ..] to place .. of each rank's buffer."""
    peer, word = tl.program_id(1), tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    target = tl.multiple_of(tl.load(buffers + peer).to(tl.pointer_type(tl.int32)), 16)
    tl.store(target + place + word, tl.load(x + peer * stride + word, mask=word < words), mask=word < words)


@triton.jit
def sum_kernel(parts, out, elements, n: tl.constexpr, ELEMENTS: tl.constexpr):
    """The sum of n parts, in their order, in float32."""
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    total = tl.zeros((ELEMENTS,), tl.float32)
    for part in tl.static_range(n):
        total += tl.load(parts + part * elements + element, mask=element < elements, other=0.0).to(tl.float32)
    tl.store(out + element, total, mask=element < elements)


def to_heads(q: Tensor, k: Tensor, v: Tensor, buffers_n: Tensor, rank: int, sizes: dict[str, int]) -> None:
    """This rank's q, k and v into all ranks' buffers, on the current stream.

    Args:
        q, k, v: [m*t, H, D] of one shape and stride, channels contiguous.
        buffers_n: int64 [n], addresses of the ranks' [3, T, h, D]; multiples of 16.
        rank: along sp.
        sizes: m, F, S, s, h.
    """
    to_heads_kernel[(triton.cdiv(q.shape[0], ROWS), q.shape[1], 3)](
        q, k, v, buffers_n, rank, *q.stride()[:2], **sizes, D=q.shape[2], ROWS=ROWS, num_warps=WARPS
    )


def to_tokens(out: Tensor, buffers_n: Tensor, rank: int, sizes: dict[str, int]) -> None:
    """Attention's result into all ranks' buffers, on the current stream.

    Args:
        out: [T, h, D], channels contiguous.
        buffers_n: as above, of the ranks' [m*t, H, D].
        rank, sizes: as above.
    """
    rows = sizes["m"] * sizes["F"] * sizes["s"]
    to_tokens_kernel[(triton.cdiv(rows, ROWS), out.shape[1], buffers_n.shape[0])](
        out, buffers_n, rank, *out.stride()[:2], **sizes, D=out.shape[2], ROWS=ROWS, num_warps=WARPS
    )


def spread(x: Tensor, buffers_n: Tensor, rank: int, *, each: bool, offset_bytes: int = 0) -> None:
    """This rank's part into all ranks' buffers, on the current stream.

    Args:
        x: contiguous, in parts of whole words (4 bytes); with ``each`` as many parts for the ranks one after the other.
        buffers_n: as above; what comes from rank i is the i-th part in them.
        rank: of this one.
        each: whether each rank gets a part of its own, or all the whole of ``x``.
        offset_bytes: where parts begin in the buffers; a multiple of 16.
    """
    words_x = x.view(-1).view(torch.int32)
    words = words_x.shape[0] // (buffers_n.shape[0] if each else 1)
    spread_kernel[(triton.cdiv(words, WORDS), buffers_n.shape[0])](
        words_x, buffers_n, words, words if each else 0, offset_bytes // 4 + rank * words, WORDS=WORDS, num_warps=WARPS
    )


def sum_parts(parts: Tensor) -> Tensor:
    """Sum of [n, ...] over n, in float32 and the order of ranks, in the type of the parts."""
    out = torch.empty_like(parts[0])
    sum_kernel[(triton.cdiv(out.numel(), ELEMENTS),)](parts, out, out.numel(), n=parts.shape[0], ELEMENTS=ELEMENTS)
    return out
