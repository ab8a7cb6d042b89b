"""Attention with keys and values in 8 bits: the scratch they stand in, the plain twin, and the wrapper.

Keys are e4m3 [H, X, D], or int8 with a scale for each row. Values are e4m3 with tokens contiguous, [H, D, X], which is
how Hopper's FP8 matrix product wants them; or, where FP8 weights cost quality, bfloat16 [H, X, D] ("BF16 P.V"). Scale
and centre: scaling.py.

What FP8 costs: a key's or value's rounding is relative, at most 2^-4 of what is left after centring, and averages out
over channels and tokens; queries have one scale each; weights are rounded after scaling by 2^8. In int8, queries and
keys are rounded by 1/254 of their row's largest channel: four times finer for Gaussian rows (SageAttention2, arXiv
2411.10958, has both; its scales span several rows).

Shape legend: H heads, T query tokens, X rows of the scratch, D head dim.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longtake.kernels.errors import ConfigError
from longtake.kernels.grid import FP8, FP8_MAX, to_fp8, to_int8_rows
from longtake.kernels.head_dims import HEAD_DIMS
from longtake.kernels.layout import align
from longtake.kernels.scaling import Scaling

P_SHIFT = 8.0
LEAST_SPLIT_KEYS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Scratch:
    """Dense keys and values of one chunk of one layer, in 8 bits.

    Args:
        k_HXD: e4m3 or int8 [H, X, D].
        v_HXD: as rows, whatever lies behind: e4m3 with tokens contiguous (with channels contiguous for
            FlashAttention-3), or bfloat16 with channels contiguous.
        k_scale_HX: float32, of int8 keys.
    """

    k_HXD: Tensor
    v_HXD: Tensor
    k_scale_HX: Tensor | None = None
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        stored = (x.untyped_storage() for x in (self.k_HXD, self.v_HXD, self.k_scale_HX) if x is not None)
        object.__setattr__(self, "num_bytes", sum(s.nbytes() for s in stored))

    @property
    def values_fp8(self) -> bool:
        """Whether values are e4m3."""
        return self.v_HXD.dtype == FP8


def fp8_scratch(
    num_heads: int,
    num_rows: int,
    head_dim: int,
    device: torch.device,
    *,
    keys_int8: bool = False,
    values_fp8: bool = True,
    turned: bool = True,
) -> Fp8Scratch:
    """Allocate a scratch of at least num_rows rows (a multiple of 16); FP8 values stand turned, tokens contiguous."""
    rows = align(num_rows)
    k_HXD = torch.empty((num_heads, rows, head_dim), dtype=torch.int8 if keys_int8 else FP8, device=device)
    k_scale_HX = torch.empty((num_heads, rows), dtype=torch.float32, device=device) if keys_int8 else None
    if values_fp8 and not turned:
        v_HXD = torch.empty((num_heads, rows, head_dim), dtype=FP8, device=device)
    elif values_fp8:
        v_HXD = torch.empty((num_heads, head_dim, rows), dtype=FP8, device=device).transpose(1, 2)
    else:
        v_HXD = torch.empty((num_heads, rows, head_dim), dtype=torch.bfloat16, device=device)
    return Fp8Scratch(k_HXD=k_HXD, v_HXD=v_HXD, k_scale_HX=k_scale_HX)


def attend_reference(
    q_HTD: Tensor, scratch: Fp8Scratch, k_scaling: Scaling, v_scaling: Scaling, num_keys: int
) -> tuple[Tensor, Tensor]:
    """The plain twin of `attend_fp8`: the same roundings, softmax written out in float32."""
    q, scale = q_HTD.float(), q_HTD.shape[-1] ** -0.5
    k, v = scratch.k_HXD[:, :num_keys].float(), scratch.v_HXD[:, :num_keys].float()
    if k_scaling.rows_HX is None:
        top = q.abs().amax(-1, keepdim=True)
        q_scale = torch.where(top > 0, top * (1.0 / FP8_MAX), torch.ones_like(top))
        q8 = to_fp8(q / q_scale).float() * (q_scale * k_scaling.scale_H[:, None, None] * scale)
    else:
        codes, q_scale = to_int8_rows(q)
        q8 = codes.float() * (q_scale.unsqueeze(-1) * scale)
        k = k * k_scaling.rows_HX[:, :num_keys, None]
    score_HTX = q8 @ k.transpose(1, 2)
    top = score_HTX.amax(-1, keepdim=True)
    weight = torch.exp(score_HTX - top)
    rounded = to_fp8(weight * 2**P_SHIFT).float() / 2**P_SHIFT if scratch.values_fp8 else weight.bfloat16().float()
    total = weight.sum(-1, keepdim=True)
    v_scale = v_scaling.scale_H if scratch.values_fp8 else torch.ones_like(v_scaling.scale_H)
    out_HTD = (rounded @ v) / total * v_scale[:, None, None]
    if scratch.values_fp8:
        out_HTD = out_HTD + v_scaling.centre_HD.unsqueeze(1)
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
        k_scaling, v_scaling: what its rows were stored with; v_scaling is not used for bfloat16 values, which are
            stored as they are. k_scaling has the scales of the scratch's rows where its keys are int8.
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
    q_HTD = q_HTD if q_HTD.stride(-1) == 1 else q_HTD.contiguous()
    kernels = "attention_hopper" if runs_on_hopper(scratch) else "attention_fp8_triton"
    attend = importlib.import_module(f"longtake.kernels.{kernels}").attend
    out: tuple[Tensor, Tensor] = attend(q_HTD, scratch.k_HXD, scratch.v_HXD, k_scaling, v_scaling, num_keys)
    return out


def hopper_splits(num_keys: int) -> int:
    """Parts of the keys that attention_hopper.py sums apart: nothing else decides, so the same keys give the same bits.

    4,680 queries of 12 heads are 444 programs for an H200's 132 processors, 3.36 rounds of 4; in two parts, 6.73 of 7.
    """
    return 2 if num_keys >= LEAST_SPLIT_KEYS else 1


def hopper_partial_bytes(num_heads: int, num_queries: int, head_dim: int, num_keys: int, itemsize: int) -> int:
    """Bytes that a call with splits takes meanwhile: outputs, in elements of that many bytes, and lse of each."""
    splits = hopper_splits(num_keys)
    return 0 if splits == 1 else splits * num_heads * num_queries * (head_dim * itemsize + torch.float32.itemsize)


def runs_on_hopper(scratch: Fp8Scratch) -> bool:
    """Whether attention over a scratch is attention_hopper.py's, for that generation's matrix products."""
    device = scratch.k_HXD.device
    if scratch.k_HXD.dtype != torch.int8 or not scratch.values_fp8 or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)
