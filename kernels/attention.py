"""Dense attention with its log-sum-exp, and the merge of partial results.

attend() over parts of the keys, then merge(), equals attend() over all of them: that is how history is read in chunks.
No part of the cache is ever concatenated. PyTorch's own kernels do the work; the one that returns a log-sum-exp is
called directly, as the public function does not return it.

Shape legend: H heads, T query tokens, X key tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.errors import ConfigError
from longtake.kernels.head_dims import fits_kernels

_HALF = (torch.bfloat16, torch.float16)


def _check(q_HTD: Tensor, k_HXD: Tensor, v_HXD: Tensor) -> None:
    if q_HTD.ndim != 3 or k_HXD.ndim != 3 or k_HXD.shape != v_HXD.shape:
        raise ConfigError(
            f"attend takes [heads, tokens, channels]: "
            f"got {tuple(q_HTD.shape)}, {tuple(k_HXD.shape)}, {tuple(v_HXD.shape)}."
        )
    if q_HTD.shape[0] != k_HXD.shape[0] or q_HTD.shape[2] != k_HXD.shape[2]:
        raise ConfigError(f"queries {tuple(q_HTD.shape)} and keys {tuple(k_HXD.shape)} differ in heads or channels.")
    if not q_HTD.dtype == k_HXD.dtype == v_HXD.dtype:
        raise ConfigError(f"attend takes one dtype: got {q_HTD.dtype}, {k_HXD.dtype}, {v_HXD.dtype}")


def _rows(x_HTD: Tensor) -> Tensor:
    """The tensor with a batch of one, channels contiguous; copied only if they are not."""
    return (x_HTD if x_HTD.stride(-1) == 1 else x_HTD.contiguous()).unsqueeze(0)


def attend_reference(q_HTD: Tensor, k_HXD: Tensor, v_HXD: Tensor) -> tuple[Tensor, Tensor]:
    """The plain twin of `attend`: softmax written out, in float32 (float64 for float64)."""
    compute = torch.float64 if q_HTD.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(compute) for x in (q_HTD, k_HXD, v_HXD))
    score_HTX = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
    lse_HT = torch.logsumexp(score_HTX, dim=-1)
    out_HTD = torch.exp(score_HTX - lse_HT.unsqueeze(-1)) @ v
    return out_HTD.to(q_HTD.dtype), lse_HT.float()


def attend(q_HTD: Tensor, k_HXD: Tensor, v_HXD: Tensor) -> tuple[Tensor, Tensor]:
    """Non-causal attention of every query to every key, scale 1/sqrt(D).

    On CUDA: cuDNN for bfloat16 and float16, PyTorch's memory-efficient kernel for float32. cuDNN builds a plan for each
    new shape (tens of milliseconds, once), so callers keep the number of different lengths small. Runs on the current
    stream, without synchronising.

    Args:
        q_HTD: [H, T, D] float32, bfloat16 or float16; any strides.
        k_HXD: [H, X, D] same dtype and device; any strides.
        v_HXD: [H, X, D] likewise.

    Returns:
        out_HTD of the same dtype, and lse_HT float32: the natural logarithm of the sum of exp(score). Without keys (X =
        0): zeros and -inf.

    Raises:
        ConfigError: shapes or dtypes do not agree.
    """
    _check(q_HTD, k_HXD, v_HXD)
    num_heads, num_tokens, head_dim = q_HTD.shape
    if k_HXD.shape[1] == 0 or num_tokens == 0:
        return torch.zeros_like(q_HTD), q_HTD.new_full((num_heads, num_tokens), float("-inf"), dtype=torch.float32)
    q, k, v = _rows(q_HTD), _rows(k_HXD), _rows(v_HXD)
    aten = torch.ops.aten
    if q.device.type == "cpu" and q.dtype in (*_HALF, torch.float32):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.device.type == "cuda" and q.dtype in _HALF and head_dim % 8 == 0 and head_dim <= 128:
        if torch.cuda.get_device_capability(q.device) >= (8, 0):
            out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
        else:
            out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    elif q.device.type == "cuda" and q.dtype == torch.float32 and head_dim % 4 == 0:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        lse = lse[..., :num_tokens]  # rounded up to a multiple of 32 rows
    else:
        return attend_reference(q_HTD, k_HXD, v_HXD)
    return out[0], lse.reshape(num_heads, num_tokens)


def merge(out_a_HTD: Tensor, lse_a_HT: Tensor, out_b_HTD: Tensor, lse_b_HT: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys into attention over both.

    Args:
        out_a_HTD: [H, T, D] result over the first set.
        lse_a_HT: float32 [H, T] its log-sum-exp; -inf where the set is empty.
        out_b_HTD: [H, T, D] result over the second set.
        lse_b_HT: float32 [H, T] its log-sum-exp.

    Returns:
        out_HTD in the wider of the two dtypes (keep an accumulator in float32 to round once), and lse_HT float32.
    """
    if fits_kernels(out_a_HTD, out_b_HTD):
        from longtake.kernels import attention_triton

        return attention_triton.merge(out_a_HTD, lse_a_HT, out_b_HTD, lse_b_HT)
    return merge_reference(out_a_HTD, lse_a_HT, out_b_HTD, lse_b_HT)


def merge_reference(out_a_HTD: Tensor, lse_a_HT: Tensor, out_b_HTD: Tensor, lse_b_HT: Tensor) -> tuple[Tensor, Tensor]:
    """The plain twin of `merge`."""
    lse_HT = torch.logaddexp(lse_a_HT, lse_b_HT)
    safe = torch.where(torch.isinf(lse_HT), torch.zeros_like(lse_HT), lse_HT)
    weight_a = torch.exp(lse_a_HT - safe).unsqueeze(-1)
    weight_b = torch.exp(lse_b_HT - safe).unsqueeze(-1)
    out_HTD = out_a_HTD.float() * weight_a + out_b_HTD.float() * weight_b
    return out_HTD.to(torch.promote_types(out_a_HTD.dtype, out_b_HTD.dtype)), lse_HT
