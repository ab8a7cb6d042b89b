"""FlashAttention-3, where its package is installed: the fastest attention on Hopper, in BF16 and in FP8.

Any build that registers FlashAttention-3's forward with PyTorch serves: `flash_attn_3` (built from its source) or
`fa3_fwd` (wheels). It runs its FP8 products with a scale a head for queries, keys and values, turns values inside, and
returns bfloat16. Keys and values are centred as in attention_fp8.py; queries have one scale a head here. Source: Shah
et al., FlashAttention-3 (arXiv 2407.08608).

Hopper's FP8 matrix products keep about 14 bits of a running sum and cut the rest off, so P.V over very many keys loses
what each further key adds. FlashAttention-3 can split the keys and merge the splits in float32, so splits bound that
sum, to about KEYS_PER_SPLIT keys (whole tiles of the package's). On an H200, 12 heads, 4,680 queries: time for
structured inputs, relative error of the output for Gaussian and for structured ones
(benchmarks/results/splits_h200.json):

    keys      1 split               2                     4                     8                     16
    32,760    1.11 ms  .055 .060    1.04 ms  .055 .053    1.09 ms  .054 .049    1.14 ms  .054 .047    1.30 ms  .054 .047
    131,040   4.42 ms  .055 .100    4.00 ms  .054 .082    4.15 ms  .054 .070    4.11 ms  .054 .062    4.29 ms  .054 .057

Our own kernel, which adds each step in float32, has .054 .048 and .054 .052 (attention_h200.json).

More splits than that are made where they fill the GPU better: 3 heads of 4,680 queries are 111 tiles, in 2 splits 222,
two rounds of 132 processors of which the second is two thirds full; in 7 splits 777, six rounds, nearly full: 0.298 ms
instead of 0.316 over 32,760 keys (splits_3_heads_h200.json; one split takes 0.287, and sums too many).

A mean of the values makes that sum large: a small one, wrongly taken from Gaussian values that had none, made their
.055 over 131,040 keys .71, in 8 splits .11. scaling.py says which means are taken.

Shape legend: H heads, T query tokens, X key tokens, D head dim, B batch (1).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.kernels.grid import to_fp8
from longtake.kernels.head_dims import HEAD_DIMS
from longtake.kernels.scaling import Scaling

_PACKAGES = ("flash_attn_3", "fa3_fwd")
_HOPPER = (9, 0)
KEYS_PER_SPLIT = 16384  # at most, in FP8: sums then add no more than a fifth to what rounded keys and values cost
_MOST_SPLITS = 256  # that the package takes
_TILE_QUERIES, _PROCESSORS = 128, 132  # of the package's kernel, of a Hopper GPU
_CHANNEL_NS, _BYTES_A_NS, _MERGE_NS = 0.071, 4000, 5000  # a tile's key, per channel; memory; launching one more kernel


@functools.cache
def _operator() -> Callable[..., tuple[Tensor, ...]] | None:
    for name in _PACKAGES:
        try:
            importlib.import_module(f"{name}._C")
        except (ImportError, OSError):
            continue
        found: Callable[..., tuple[Tensor, ...]] = getattr(torch.ops, name).fwd
        return found
    return None


def available(device: torch.device, head_dim: int) -> bool:
    """Whether FlashAttention-3 is installed and runs on a device."""
    if device.type != "cuda" or head_dim not in HEAD_DIMS:
        return False
    return torch.cuda.get_device_capability(device) == _HOPPER and _operator() is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """A block's queries in FP8.

    Args:
        q_HTD: e4m3 [H, T, D], channels contiguous.
        scale_H: float32 [H].
        shift_HT: float32 [H, T]: what the centre taken from the keys takes from a query's scores.
    """

    q_HTD: Tensor
    scale_H: Tensor
    shift_HT: Tensor


def quantise(q_HTD: Tensor, q_scaling: Scaling, k_scaling: Scaling) -> Queries:
    """Round queries to e4m3.

    Args:
        q_HTD: [H, T, D] any float type, channels contiguous.
        q_scaling: of the queries; its centre is not used, softmax would mind.
        k_scaling: of the keys they will meet.
    """
    if q_HTD.is_cuda:
        from longtake.kernels.attention_fp8_triton import quantise_queries

        q8_HTD, shift_HT = quantise_queries(q_HTD, q_scaling.scale_H, k_scaling.centre_HD)
        return Queries(q_HTD=q8_HTD, scale_H=q_scaling.scale_H, shift_HT=shift_HT)
    return quantise_reference(q_HTD, q_scaling, k_scaling)


def quantise_reference(q_HTD: Tensor, q_scaling: Scaling, k_scaling: Scaling) -> Queries:
    """The plain twin of `quantise`."""
    q = q_HTD.float()
    shift_HT = (q * k_scaling.centre_HD.unsqueeze(1)).sum(-1) * q.shape[-1] ** -0.5
    return Queries(q_HTD=to_fp8(q / q_scaling.scale_H[:, None, None]), scale_H=q_scaling.scale_H, shift_HT=shift_HT)


def attend(q_HTD: Tensor, k_HXD: Tensor, v_HXD: Tensor) -> tuple[Tensor, Tensor]:
    """As attention.attend, for bfloat16 on Hopper; arguments and results are the same."""
    # one split: the tensor core's sums of bfloat16 products are float32's, and splits paid with 12 heads only (by 5 %)
    out_BTHD, lse_BHT = _forward(q_HTD, k_HXD, v_HXD, 1)
    return out_BTHD[0].transpose(0, 1), lse_BHT[0]


@functools.lru_cache(maxsize=1024)
def fp8_splits(num_heads: int, num_queries: int, head_dim: int, num_keys: int) -> int:
    """Splits of FP8 attention: enough to bound its sums, and up to four times as many if that is faster.

    Sizes alone decide: the same ones give the same bits on any GPU. Times are a model of an H200 that agrees with
    splits_h200.json: tiles of 128 queries in rounds of all processors, then results written and read once more.
    """
    least = max(1, -(-num_keys // KEYS_PER_SPLIT))
    tiles = num_heads * -(-num_queries // _TILE_QUERIES)

    def nanoseconds(splits: int) -> float:
        rounds = -(-tiles * splits // _PROCESSORS)
        merging = 2 * _partial_bytes(splits, num_heads, num_queries, head_dim) / _BYTES_A_NS + _MERGE_NS
        return rounds * num_keys / splits * head_dim * _CHANNEL_NS + (merging if splits > 1 else 0.0)

    return min(range(min(least, _MOST_SPLITS), min(4 * least, _MOST_SPLITS) + 1), key=nanoseconds)


def _partial_bytes(splits: int, num_heads: int, num_queries: int, head_dim: int) -> int:
    return 0 if splits == 1 else splits * num_heads * num_queries * (head_dim + 1) * torch.float32.itemsize


def partial_bytes(num_heads: int, num_queries: int, head_dim: int, num_keys: int) -> int:
    """Bytes that the package takes for an FP8 call whose keys are split: float32 outputs and lse of each split."""
    splits = fp8_splits(num_heads, num_queries, head_dim, num_keys)
    return _partial_bytes(splits, num_heads, num_queries, head_dim)


def attend_fp8(
    queries: Queries,
    k_HXD: Tensor,
    v_HXD: Tensor,
    k_scaling: Scaling,
    v_scaling: Scaling,
    *,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Non-causal attention in FP8, scale 1/sqrt(D), on the current stream, without synchronising.

    With several splits the package allocates `partial_bytes` for the call.

    Args:
        queries: of the block.
        k_HXD: e4m3 [H, X, D], channels contiguous, as k_scaling stores them.
        v_HXD: likewise.
        k_scaling, v_scaling: what they were stored with.
        num_splits: parts of the keys that are summed apart, 1 to 256; None: as fp8_splits says.

    Returns:
        out_HTD bfloat16 and lse_HT float32, of the scores as they are without centring.
    """
    out_BTHD, lse_BHT = _forward(
        queries.q_HTD,
        k_HXD,
        v_HXD,
        num_splits or fp8_splits(*queries.q_HTD.shape, k_HXD.shape[1]),
        q_descale=queries.scale_H[None],
        k_descale=k_scaling.scale_H[None],
        v_descale=v_scaling.scale_H[None],
    )
    out_HTD, lse_HT = out_BTHD[0].transpose(0, 1), lse_BHT[0]
    if out_HTD.is_cuda:
        from longtake.kernels.attention_triton import restore

        restore(out_HTD, lse_HT, v_scaling.centre_HD, queries.shift_HT)
    else:
        restore_reference(out_HTD, lse_HT, v_scaling.centre_HD, queries.shift_HT)
    return out_HTD, lse_HT


def restore_reference(out_HTD: Tensor, lse_HT: Tensor, centre_HD: Tensor, shift_HT: Tensor) -> None:
    """The plain twin of attention_triton.restore: what centring took, added in float32 and rounded once."""
    out_HTD.add_(centre_HD.unsqueeze(1))
    lse_HT.add_(shift_HT)


def _forward(q_HTD: Tensor, k_HXD: Tensor, v_HXD: Tensor, num_splits: int, **scales: Tensor) -> tuple[Tensor, Tensor]:
    operator = _operator()
    assert operator is not None, "available() comes first"
    tokens_first = (x.transpose(0, 1).unsqueeze(0) for x in (q_HTD, k_HXD, v_HXD))
    # never 0, the package's own choice: it would look at the GPU, and resuming on another would not be bit for bit
    out_BTHD, lse_BHT, *_ = operator(
        *tokens_first, softmax_scale=q_HTD.shape[-1] ** -0.5, num_splits=num_splits, **scales
    )
    return out_BTHD, lse_BHT
