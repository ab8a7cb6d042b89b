"""Ulysses' two exchanges as plain stores into the other ranks' memory: what is sent lies where it will be read.

Each program copies some rows of one head to the rank that wants them: no packing before and no reordering after, as a
collective needs. Whoever reads waits until all have written (engine/peer_exchange.py). Tokens are dealt to ranks as
engine/ulysses.py says.

Shape legend: n ranks along sp, m ranks along tp that split tokens too, F latent frames, S tokens of a latent frame, s
those of a share, t = F*s, T = F*S, H heads before the exchange, h = H/n after it, D head dim.
"""

# Triton has no type stubs and its kernels no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, WARPS = 64, 8


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
