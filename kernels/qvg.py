"""Quant VideoGen: a token minus its nearest centroid, quantised: `qvg`, `qvg-pro`.

k-means over a block's tokens of each head (arXiv 2602.02958); a token keeps the number of its centroid, and what is
left after subtracting it goes to a symmetric grid of 4 levels with an e4m3 step for B channels. qvg-pro repeats the
clustering on what is left, 4 stages in all, and has finer groups.

    section of one head:   | codes: T rows of D/4 bytes | steps: T x D/B x e4m3 | ids: S x T x u8 |
                           | centroids: S x K x D x e4m3 | unit: f32 of the steps, S x f32 of the centroids |

What differs from the original, and why:
- One block is encoded at a time, and a payload must be readable alone and by any rank: so the codebook rides in the
  payload. 256 centroids in bfloat16 for 4,680 tokens would take 0.875 bits an element a stage; they are stored as e4m3,
  half of that, which costs no accuracy to speak of, since residuals are taken from the rounded centroids. (Sharing a
  codebook between blocks saves those bits, but makes a block unreadable without an older one, which may be evicted, or
  on another rank.)
- K = 256 for 4,096 tokens and more; smaller blocks have the largest power of two below a sixteenth of their tokens (8
  centroids for mini's 180): more would cost more than they save.
- The grid has 4 levels (-1.5, -0.5, 0.5, 1.5 steps) rather than 3 with one code unused, and the step is the best of ten
  by squared error rather than the largest value: both make it stronger than the published one.

Lloyd's algorithm starts from tokens at even distances and runs 10 rounds; no randomness.

Shape legend: T tokens, H heads, D head dim, S stages, K centroids, G groups of a token, C channels of a group, B bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.kernels.codec import BlockGeometry, Side
from longtake.kernels.grid import (
    FP8,
    best_symmetric_step,
    power_of_two_unit,
    quantise_symmetric,
    symmetric_values,
    to_fp8,
)
from longtake.kernels.layout import Field, Layout, pack_codes, unpack_codes
from longtake.kernels.tensor_codec import HeadwiseCodec, TensorCodec

MAX_CENTROIDS = 256
TOKENS_PER_CENTROID = 16
ROUNDS = 10
BITS = 2


def num_centroids(num_tokens: int) -> int:
    """Centroids for a block: a power of two, at most 256 and at most a sixteenth of its tokens; at least 1."""
    return min(MAX_CENTROIDS, 1 << max(0, (num_tokens // TOKENS_PER_CENTROID).bit_length() - 1))


def cluster(x_TD: Tensor, count: int, rounds: int = ROUNDS) -> Tensor:
    """Lloyd's algorithm from evenly spaced tokens: float32 [count, D]; a centroid that loses all tokens stays."""
    tokens = x_TD.shape[0]
    start = ((torch.arange(count, device=x_TD.device) + 0.5) * (tokens / count)).long()
    centroid_KD = x_TD[start]
    for _ in range(rounds):
        member_TK = torch.nn.functional.one_hot(nearest(x_TD, centroid_KD), count).to(x_TD.dtype)
        size_K1 = member_TK.sum(0).unsqueeze(-1)
        centroid_KD = torch.where(size_K1 > 0, (member_TK.T @ x_TD) / size_K1.clamp(min=1), centroid_KD)
    return centroid_KD


def nearest(x_TD: Tensor, centroid_KD: Tensor) -> Tensor:
    """Number of the nearest centroid of each token, int64 [T]."""
    return (centroid_KD.square().sum(-1) - 2 * (x_TD @ centroid_KD.T)).argmin(-1)


class Clustered(HeadwiseCodec):
    """Stages of centroids, then a symmetric 2-bit grid.

    Args:
        geometry: the block.
        stages: how often what is left is clustered.
        group: most channels that share a step.
    """

    def __init__(self, geometry: BlockGeometry, *, stages: int, group: int) -> None:
        super().__init__(geometry)
        tokens, dim = geometry.num_tokens, geometry.head_dim
        self.stages = stages
        self.group = min(group, dim & -dim)
        self.count = num_centroids(tokens)
        self.layout = Layout(
            Field(name="codes", dtype=torch.uint8, shape=(tokens, dim * BITS // 8)),
            Field(name="steps", dtype=FP8, shape=(tokens, dim // self.group)),
            Field(name="ids", dtype=torch.uint8, shape=(stages, tokens)),
            Field(name="centroids", dtype=FP8, shape=(stages, self.count, dim)),
            Field(name="units", dtype=torch.float32, shape=(1 + stages,)),
        )

    def pack_head(self, x_TD: Tensor, payload_B: Tensor) -> None:
        units = self.layout.view(payload_B, "units")
        rest = x_TD
        for stage in range(self.stages):
            centroid = cluster(rest, self.count)
            unit = power_of_two_unit(centroid.abs().max())
            stored = to_fp8(centroid / unit)
            ids = nearest(rest, stored.float() * unit)
            self.layout.view(payload_B, "centroids")[stage].copy_(stored)
            self.layout.view(payload_B, "ids")[stage].copy_(ids)
            units[1 + stage] = unit
            rest = rest - (stored.float() * unit)[ids]
        rest_TGC = rest.reshape(rest.shape[0], -1, self.group)
        unit = power_of_two_unit(rest.abs().max())
        step = best_symmetric_step(rest_TGC, BITS, unit)
        codes = quantise_symmetric(rest_TGC, step.float() * unit, BITS)
        units[0] = unit
        self.layout.view(payload_B, "steps").copy_(step.squeeze(-1))
        self.layout.view(payload_B, "codes").copy_(pack_codes(codes.flatten(-2), BITS))

    def unpack(self, section_B: Tensor) -> Tensor:
        units = self.layout.view(section_B, "units")
        codes = unpack_codes(self.layout.view(section_B, "codes"), BITS)
        step = self.layout.view(section_B, "steps").float() * units[..., :1, None]
        codes_TGC = codes.reshape(*codes.shape[:-1], -1, self.group)
        x = symmetric_values(codes_TGC, step.unsqueeze(-1), BITS).flatten(-2)
        ids = self.layout.view(section_B, "ids").long()
        centroids = self.layout.view(section_B, "centroids").float() * units[..., 1:, None, None]
        for stage in range(self.stages):
            place = ids[..., stage, :, None].expand_as(x)
            x = x + centroids[..., stage, :, :].gather(-2, place)
        return x


def tensor_codec(name: str, geometry: BlockGeometry, side: Side) -> TensorCodec:
    """Make `qvg` (1 stage, groups of 64) or `qvg-pro` (4 stages, groups of 16); both sides alike."""
    if name == "qvg":
        return Clustered(geometry, stages=1, group=64)
    return Clustered(geometry, stages=4, group=16)
