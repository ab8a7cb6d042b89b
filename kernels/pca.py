"""Budget-PCA: mean + a few principal directions + an asymmetric 4-level grid along channels: `budget-pca`.

The block's mean and its strongest directions are removed for each head (as in the replication of Quant VideoGen that
proposed it); what is left has a grid for 128 channels of a token. A token's coefficients are 8-bit numbers, and what is
left is taken from the rounded ones, so the grid also repairs their rounding.

    section of one head:   | codes: T rows of D/4 bytes | coefficients: T x R x i8 | grid: T x D/128 x 2 x e4m3 |
                           | directions: R x D x f16 | mean: D x f16 | scales: (R + 1) x f32 |

R is the most, up to 4, that keeps a block at or below 2.33 bits an element (3 for 4,680 x 128), at least 1.

Shape legend: T tokens, H heads, D head dim, R directions, G groups of a token, C channels of a group, B bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.codec import BlockGeometry, Side
from longtake.kernels.grid import FP8, FP8_MAX, power_of_two_unit, quantise_affine, to_fp8
from longtake.kernels.layout import Field, Layout, pack_codes, unpack_codes
from longtake.kernels.tensor_codec import HeadwiseCodec, TensorCodec

BITS = 2
GROUP = 128
MAX_RANK = 4
TARGET_BITS = 2.33


def principal_directions(x_TD: Tensor, rank: int) -> Tensor:
    """The directions of largest variance of centred tokens, float32 [rank, D], each with its largest entry positive."""
    covariance = (x_TD.T @ x_TD).double().cpu()
    direction_RD = torch.linalg.eigh(covariance).eigenvectors.T.flip(0)[:rank]
    loudest = direction_RD.abs().argmax(-1, keepdim=True)
    signed: Tensor = direction_RD * direction_RD.gather(-1, loudest).sign()
    return signed.float().to(x_TD.device)


class BudgetPca(HeadwiseCodec):
    """Low rank plus an asymmetric 2-bit grid.

    Args:
        geometry: the block.
        rank: directions removed; None takes what fits the budget.
    """

    def __init__(self, geometry: BlockGeometry, rank: int | None = None) -> None:
        super().__init__(geometry)
        self.group = min(GROUP, geometry.head_dim & -geometry.head_dim)
        if rank is None:
            budget = TARGET_BITS * geometry.num_tokens * geometry.head_dim / 8
            rank = max(r for r in range(1, MAX_RANK + 1) if r == 1 or self._layout(r).num_bytes <= budget)
        self.rank = rank
        self.layout = self._layout(rank)

    def _layout(self, rank: int) -> Layout:
        tokens, dim = self.geometry.num_tokens, self.geometry.head_dim
        return Layout(
            Field(name="codes", dtype=torch.uint8, shape=(tokens, dim * BITS // 8)),
            Field(name="coefficients", dtype=torch.int8, shape=(tokens, rank)),
            Field(name="grid", dtype=FP8, shape=(tokens, dim // self.group, 2)),
            Field(name="directions", dtype=torch.float16, shape=(rank, dim)),
            Field(name="mean", dtype=torch.float16, shape=(dim,)),
            Field(name="scales", dtype=torch.float32, shape=(rank + 1,)),
        )

    def pack_head(self, x_TD: Tensor, payload_B: Tensor) -> None:
        mean = x_TD.mean(0).half()
        rest = x_TD - mean.float()
        direction = principal_directions(rest, self.rank).half()
        coefficient = rest @ direction.float().T
        scale = coefficient.abs().amax(0) * (1.0 / 127)
        code = torch.round(coefficient / torch.where(scale > 0, scale, torch.ones_like(scale))).clamp(-127, 127)
        rest = rest - (code * scale) @ direction.float()

        rest_TGC = rest.reshape(rest.shape[0], -1, self.group)
        low, high = rest_TGC.amin(-1, keepdim=True), rest_TGC.amax(-1, keepdim=True)
        unit = power_of_two_unit(rest.abs().max(), FP8_MAX)
        step = to_fp8((high - low) * (1.0 / (2**BITS - 1)) / unit)
        zero = to_fp8(low / unit)
        codes = quantise_affine(rest_TGC, step.float() * unit, zero.float() * unit, BITS)

        view = self.layout.view
        view(payload_B, "codes").copy_(pack_codes(codes.flatten(-2), BITS))
        view(payload_B, "coefficients").copy_(code)
        view(payload_B, "grid").copy_(torch.cat((step.float(), zero.float()), dim=-1))
        view(payload_B, "directions").copy_(direction)
        view(payload_B, "mean").copy_(mean)
        view(payload_B, "scales").copy_(torch.cat((scale, unit.reshape(1))))

    def unpack(self, section_B: Tensor) -> Tensor:
        view = self.layout.view
        scales = view(section_B, "scales")
        codes = unpack_codes(view(section_B, "codes"), BITS)
        grid = view(section_B, "grid").float() * scales[..., -1, None, None, None]
        codes_TGC = codes.reshape(*codes.shape[:-1], -1, self.group).float()
        x = (codes_TGC * grid[..., :1] + grid[..., 1:]).flatten(-2)
        coefficient = view(section_B, "coefficients").float() * scales[..., None, :-1]
        return x + coefficient @ view(section_B, "directions").float() + view(section_B, "mean").float().unsqueeze(-2)


def tensor_codec(name: str, geometry: BlockGeometry, side: Side) -> TensorCodec:
    """Make `budget-pca`; both sides alike."""
    return BudgetPca(geometry)
