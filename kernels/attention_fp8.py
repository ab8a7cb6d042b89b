"""Attention with FP8 keys and values: the scratch they stand in, the plain twin, and the wrapper.

Keys are e4m3 [H, X, D], values e4m3 with tokens contiguous, [H, D, X], which is how the FP8 matrix product of a Hopper
GPU wants them. Scale and centre: scaling.py.

What FP8 costs: a key's or value's rounding is relative, at most 2^-4 of what is left after centring, and averages out
over channels and tokens; queries have one scale each; weights are rounded after scaling by 2^8.

Shape legend: H heads, T query tokens, X rows of the scratch, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from longtake.kernels.errors import ConfigError
from longtake.kernels.grid import FP8, FP8_MAX, to_fp8
from longtake.kernels.head_dims import HEAD_DIMS
from longtake.kernels.layout import align
from longtake.kernels.scaling import Scaling

P_SHIFT = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Scratch:
    """Dense keys and values of one chunk of one layer, in FP8.

    Args:
        k_HXD: e4m3 [H, X, D].
        v_HXD: likewise as rows, whatever lies behind: tokens contiguous, or for FlashAttention-3 channels.
    """

    k_HXD: Tensor
    v_HXD: Tensor
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        stored = (self.k_HXD.untyped_storage(), self.v_HXD.untyped_storage())
        object.__setattr__(self, "num_bytes", sum(s.nbytes() for s in stored))


def fp8_scratch(
    num_heads: int, num_rows: int, head_dim: int, device: torch.device, *, turned: bool = True
) -> Fp8Scratch:
    """Allocate a scratch of at least num_rows rows (a multiple of 16); turned: with tokens of values contiguous."""
    rows = align(num_rows)
    k_HXD = torch.empty((num_heads, rows, head_dim), dtype=FP8, device=device)
    v_HXD = torch.empty_like(k_HXD)
    return Fp8Scratch(k_HXD=k_HXD, v_HXD=v_HXD.view(num_heads, head_dim, rows).transpose(1, 2) if turned else v_HXD)


def attend_reference(
    q_HTD: Tensor, scratch: Fp8Scratch, k_scaling: Scaling, v_scaling: Scaling, num_keys: int
) -> tuple[Tensor, Tensor]:
    """The plain twin of `attend_fp8`: the same roundings, softmax written out in float32."""
    q, scale = q_HTD.float(), q_HTD.shape[-1] ** -0.5
    top = q.abs().amax(-1, keepdim=True)
    q_scale = torch.where(top > 0, top * (1.0 / FP8_MAX), torch.ones_like(top))
    k, v = scratch.k_HXD[:, :num_keys].float(), scratch.v_HXD[:, :num_keys].float()
    q8 = to_fp8(q / q_scale).float() * (q_scale * k_scaling.scale_H[:, None, None] * scale)
    score_HTX = q8 @ k.transpose(1, 2)
    top = score_HTX.amax(-1, keepdim=True)
    weight = torch.exp(score_HTX - top)
    rounded = to_fp8(weight * 2**P_SHIFT).float() / 2**P_SHIFT
    total = weight.sum(-1, keepdim=True)
    out_HTD = (rounded @ v) / total * v_scaling.scale_H[:, None, None] + v_scaling.centre_HD.unsqueeze(1)
    shift_HT = (q * k_scaling.centre_HD.unsqueeze(1)).sum(-1) * scale
    return out_HTD.to(q_HTD.dtype), (top + total.log()).squeeze(-1) + shift_HT


def attend_fp8(
    q_HTD: Tensor, scratch: Fp8Scratch, k_scaling: Scaling, v_scaling: Scaling, num_keys: int
) -> tuple[Tensor, Tensor]:
    """Non-causal attention of every query to the first num_keys rows of the scratch, scale 1/sqrt(D).

    Runs on the current stream, without synchronising.

    Args:
        q_HTD: [H, T, D] float32, bfloat16 or float16, turned to its positions.
        scratch: keys and values; rows from num_keys on are not read (or not used).
        k_scaling, v_scaling: what its rows were stored with.
        num_keys: rows in use.

    Returns:
        out_HTD of q's dtype, and lse_HT float32: the natural logarithm of the sum of exp(score), of the scores as they
        are without centring. Without keys: zeros and -inf.

    Raises:
        ConfigError: shapes do not agree.
    """
    num_heads, num_tokens, head_dim = q_HTD.shape
    rows = scratch.k_HXD.shape[1]
    if (num_heads, head_dim) != (scratch.k_HXD.shape[0], scratch.k_HXD.shape[2]) or not 0 <= num_keys <= rows:
        raise ConfigError(
            f"queries {tuple(q_HTD.shape)} and {num_keys} keys do not fit a scratch {tuple(scratch.k_HXD.shape)}."
        )
    if num_keys == 0 or num_tokens == 0:
        return torch.zeros_like(q_HTD), q_HTD.new_full((num_heads, num_tokens), float("-inf"), dtype=torch.float32)
    if not q_HTD.is_cuda or head_dim not in HEAD_DIMS:
        return attend_reference(q_HTD, scratch, k_scaling, v_scaling, num_keys)
    from longtake.kernels import attention_fp8_triton

    return attention_fp8_triton.attend(
        q_HTD if q_HTD.stride(-1) == 1 else q_HTD.contiguous(),
        scratch.k_HXD,
        scratch.v_HXD,
        k_scaling,
        v_scaling,
        num_keys,
    )
