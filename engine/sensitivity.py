"""How much what a model makes of a block depends on each token of its history: slopes by keys and values.

While a rollout denoises, `watch` lets every pass be computed with autograd: the history's keys (normed, before RoPE)
and values are leaves, as they are read from their payloads, and a few random directions of the pass's clean estimate
are traced back to them. Directions are Gaussian, so that the sum of a token's outer squares tells, in the mean, by how
much any small error of it moves the estimate (the Gauss-Newton matrix, by Hutchinson's probes).

A rollout's steps are of inference mode, whose tensors autograd does not keep: passes step out of it, and what such
tensors they need they copy.

Shape legend: T tokens of a block, H heads, D head dim, X rows, N blocks; latents B, C, F, Y, X.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from longtake.engine.attention import HistoryAttention
from longtake.engine.graphs import PassGraphs
from longtake.engine.model import CausalWan, TextContext
from longtake.engine.rollout import Rollout
from longtake.kernels.attention_path import AttentionPath
from longtake.kernels.codec import BlockGeometry, Codec
from longtake.kernels.rotary import HeadRotary, Rotary, Turns, rotate_pairs


class Witness(Protocol):
    """What is told of the history and of slopes; a layer's keys and values are [H, X, D]."""

    def see_history(self, geometry: BlockGeometry, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Once for each block that reads history: keys before RoPE and values, whole blocks, by layer."""

    def see_slopes(self, layer: int, dk_HXD: Tensor, dv_HXD: Tensor) -> None:
        """For each direction, and each layer: slopes of the clean estimate in it, by the history's keys and values."""


class SlopePath(AttentionPath):
    """Attention in the model's own type that autograd can follow, all history in one chunk.

    Args:
        codec, num_heads, num_rows: as for AttentionPath.
        dtype, device: of the model.

    Attributes:
        leaves: keys before RoPE and values [H, X, D] of the latest pass with autograd, by layer.
    """

    name = "slopes"

    def __init__(self, codec: Codec, num_heads: int, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(codec, num_heads, num_rows)
        self._dtype, self._device = dtype, device
        self._rows: list[tuple[Tensor, Tensor]] = []
        self.leaves: list[tuple[Tensor, Tensor]] = []

    @property
    def num_bytes(self) -> int:
        return 0

    def begin(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, rotary: Turns) -> None:
        q_HTD, k_HTD, v_HTD = (x_THD.transpose(0, 1) for x_THD in (q_THD, k_THD, v_THD))
        self._own = turned(q_HTD, rotary), turned(k_HTD, rotary), v_HTD
        self._rows = []

    def write_history(
        self, pages_GHP: Tensor, slots_N: Tensor, rotary: Turns, *, codec: Codec | None = None, row: int = 0
    ) -> None:
        assert row == 0, "one form, one chunk"
        shape = (self.num_heads, rotary.num_tokens, self.codec.geometry.head_dim)
        k_HXD, v_HXD = (torch.empty(shape, dtype=self._dtype, device=self._device) for _ in range(2))
        with torch.no_grad():
            (codec or self.codec).materialise(pages_GHP, slots_N, still(rotary), k_HXD, v_HXD)
        if torch.is_grad_enabled():
            self.leaves.append((k_HXD.requires_grad_(), v_HXD.requires_grad_()))
        self._rows.append((turned(k_HXD, rotary), v_HXD))

    def write_own(self, row: int) -> None:
        self._rows.append(self._begun()[1:])

    def attend(self, num_rows: int) -> tuple[Tensor, Tensor]:
        q_HTD = self._begun()[0]
        k_HXD, v_HXD = (torch.cat(rows, dim=1) for rows in zip(*self._rows, strict=True))
        assert k_HXD.shape[1] == num_rows, "one chunk"
        out_HTD = torch.nn.functional.scaled_dot_product_attention(q_HTD[None], k_HXD[None], v_HXD[None])[0]
        return out_HTD, torch.zeros(q_HTD.shape[:2], device=q_HTD.device)

    def finish(self) -> None:
        super().finish()
        self._rows = []


def turned(x_HTD: Tensor, rotary: Turns) -> Tensor:
    """Rows at their positions, in their own type."""
    if isinstance(rotary, HeadRotary):
        return torch.stack([turned(x_TD, one) for x_TD, one in zip(x_HTD, rotary.heads, strict=True)])
    own = Rotary(temporal_YP2=rotary.temporal_YP2.clone(), spatial_SQ2=rotary.spatial_SQ2.clone())  # autograd keeps it
    return rotate_pairs(x_HTD.float(), own).to(x_HTD.dtype)


def still(rotary: Turns) -> Rotary:
    """Tables of as many tokens that turn nothing."""
    one = rotary.heads[0] if isinstance(rotary, HeadRotary) else rotary
    tables = [torch.zeros_like(table) for table in (one.temporal_YP2, one.spatial_SQ2)]
    for table in tables:
        table[..., 0] = 1
    return Rotary(temporal_YP2=tables[0], spatial_SQ2=tables[1])


class SlopePasses(PassGraphs):
    """A model's passes; those that denoise over a history are traced back to it.

    Args:
        model: of the rollout.
        path: that they attend by.
        witness: told of what is found.
        probes: directions of each pass.
    """

    def __init__(self, model: CausalWan, path: SlopePath, witness: Witness, probes: int) -> None:
        super().__init__(model, None)
        self._path, self._witness, self._probes = path, witness, probes
        self._generator = torch.Generator().manual_seed(0)
        self._seen_of: int | None = None

    def run(
        self,
        block: int,
        latents_BCFYX: Tensor,
        timesteps_BF: Tensor,
        context: TextContext,
        attention: HistoryAttention,
    ) -> Tensor:
        if attention.commits:
            return super().run(block, latents_BCFYX, timesteps_BF, context, attention)
        with torch.inference_mode(False), torch.enable_grad():
            context = [(k_BHKD.clone(), v_BHKD.clone()) for k_BHKD, v_BHKD in context]
            latents, timesteps = latents_BCFYX.clone(), timesteps_BF.clone()
            flow: Tensor = self._model(latents, timesteps, context, attention)
            leaves, self._path.leaves = self._path.leaves, []
            if leaves:
                if self._seen_of != block:
                    history = [(k_HXD.detach(), v_HXD.detach()) for k_HXD, v_HXD in leaves]
                    self._witness.see_history(self._path.codec.geometry, history)
                    self._seen_of = block
                self._trace(flow, timesteps, leaves)
        return flow.detach()

    def _trace(self, flow_BCFYX: Tensor, timesteps_BF: Tensor, leaves: list[tuple[Tensor, Tensor]]) -> None:
        """Tell of slopes of the clean estimate, the noisy latents less sigma times the flow, in random directions."""
        sigma_BF = (timesteps_BF / 1000).repeat_interleave(flow_BCFYX.shape[2] // timesteps_BF.shape[1], dim=1)
        inputs = [tensor for pair in leaves for tensor in pair]
        for probe in range(self._probes):
            direction = torch.randn(flow_BCFYX.shape, generator=self._generator).to(flow_BCFYX.device)
            direction = direction * sigma_BF[:, None, :, None, None] / flow_BCFYX[0].numel() ** 0.5
            direction = direction.to(flow_BCFYX.dtype)
            slopes = torch.autograd.grad(flow_BCFYX, inputs, direction, retain_graph=probe < self._probes - 1)
            for layer in range(len(leaves)):
                self._witness.see_slopes(layer, slopes[2 * layer], slopes[2 * layer + 1])


def watch(rollout: Rollout, witness: Witness, probes: int) -> None:
    """Let a rollout's passes be traced back to their history, which is in one form; before its first step."""
    assert len(rollout.forms) == 1, "one form, one chunk"
    timeline, heads = rollout.timeline, len(rollout.model.heads)
    num_blocks = max(2, timeline.max_attended + timeline.max_own_blocks)
    num_rows = num_blocks * rollout.codec.geometry.num_tokens
    path = SlopePath(rollout.codec, heads, num_rows, rollout.dtype, rollout.device)
    rollout.path, rollout.passes = path, SlopePasses(rollout.model, path, witness, probes)
