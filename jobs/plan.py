"""``longtake plan``: what a film takes, before anything is rented: the engine's own arithmetic, nothing allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longtake.engine.config import Precision, ShotConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ShotPlan:
    """What one shot takes.

    Args:
        num_frames, num_latents, num_blocks: video frames, latent frames and blocks to render.
        num_prefix_blocks: blocks of the shot before that are committed first.
        attended_blocks: the most history blocks that one block reads.
        bits_per_element: stored for one element of K or V, scales and all.
        block_bytes: payloads of one block, all layers and heads.
        history_bytes: payloads of the whole shot, blocks committed anew included: what a host or disk tier keeps.
        dense_history_bytes: the same K and V in bfloat16.
        arena_bytes: device arena: attended blocks and the one being committed, or the film's device budget.
        scratch_bytes: dense K and V of one layer's chunk of history.
        weights_bytes: the transformer's.
    """

    name: str
    model: str
    codec: str
    height: int
    width: int
    fps: int
    num_frames: int
    num_latents: int
    num_blocks: int
    num_prefix_blocks: int
    attended_blocks: int
    bits_per_element: float
    block_bytes: int
    history_bytes: int
    dense_history_bytes: int
    arena_bytes: int
    scratch_bytes: int
    weights_bytes: int

    @property
    def device_bytes(self) -> int:
        """Device memory that is known before rendering; activations and the VAE's come on top."""
        return self.arena_bytes + self.scratch_bytes + self.weights_bytes


def plan_shot(shot: ShotConfig, dtype_name: str = "bfloat16") -> ShotPlan:
    """Add up what a shot takes.

    Args:
        shot: resolved.
        dtype_name: of weights and scratch: "bfloat16" (a GPU) or "float32" (a CPU).

    Raises:
        CapacityError: the device budget does not hold a block.
    """
    import torch

    from longtake.engine.fp8_linear import quantise_linears
    from longtake.engine.model import CausalWan
    from longtake.engine.rollout import scratch_tokens, shot_codec
    from longtake.engine.timeline import Timeline
    from longtake.offload.cache import CacheBudget
    from longtake.offload.shape import ModelKVShape

    dtype: torch.dtype = getattr(torch, dtype_name)
    geometry = shot.model.transformer
    codec = shot_codec(shot)
    shape = ModelKVShape(num_layers=geometry.num_layers, num_heads=geometry.num_heads, codec=codec)
    timeline = Timeline(shot, shot.after_blocks)
    budget = CacheBudget(device_bytes=shot.cache.device_bytes, num_blocks=timeline.max_held)
    arena_frames, num_history = budget.num_frames(shape), timeline.num_entries
    dense_block = 2 * 2 * shot.tokens_per_block * geometry.dim * geometry.num_layers
    with torch.device("meta"):
        model = CausalWan(geometry).cast(dtype)
        if shot.model.weights.precision is Precision.FP8:
            quantise_linears(model)
    return ShotPlan(
        name=shot.name,
        model=shot.model.name,
        codec=shot.cache.codec,
        height=shot.height,
        width=shot.width,
        fps=shot.fps,
        num_frames=shot.num_frames,
        num_latents=shot.num_latents,
        num_blocks=shot.num_blocks,
        num_prefix_blocks=shot.after_blocks,
        attended_blocks=timeline.max_attended,
        bits_per_element=codec.bits_per_element,
        block_bytes=shape.block_bytes,
        history_bytes=num_history * shape.block_bytes,
        dense_history_bytes=num_history * dense_block,
        arena_bytes=arena_frames * shape.block_bytes,
        scratch_bytes=2 * scratch_tokens(shot, shot.after_blocks, dtype) * geometry.dim * dtype.itemsize,
        weights_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
    )


def plan_film(configs: Mapping[str, ShotConfig], dtype_name: str = "bfloat16") -> list[ShotPlan]:
    """Plans of all shots, in the order of rendering."""
    return [plan_shot(config, dtype_name) for config in configs.values()]


def to_json(plans: list[ShotPlan]) -> dict[str, Any]:
    """Plans as JSON-able data, with the film's totals: one shot is on a device at a time, histories add up."""
    return {
        "shots": [dataclasses.asdict(plan) | {"device_bytes": plan.device_bytes} for plan in plans],
        "num_frames": sum(plan.num_frames for plan in plans),
        "num_blocks": sum(plan.num_blocks for plan in plans),
        "device_bytes": max(plan.device_bytes for plan in plans),
        "history_bytes": sum(plan.history_bytes for plan in plans),
    }
