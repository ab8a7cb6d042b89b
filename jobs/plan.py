"""``longtake plan``: what a film takes, before anything is rented: the engine's own arithmetic, nothing allocated.

Bytes are exact where the engine allocates them; activations and seconds follow from a benchmark (see `calibration`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtake.engine.config import HistoryPolicy, Keep, ModelConfig, Precision, ShotConfig
from longtake.engine.timeline import Timeline
from longtake.jobs.calibration import Calibration, choose, film_seconds, shot_seconds

if TYPE_CHECKING:
    import torch

    from longtake.kernels.codec import Codec

_LATENT_BYTES = 4  # float32


@dataclass(frozen=True, slots=True, kw_only=True)
class ShotPlan:
    """What one shot takes.

    Args:
        num_frames, num_latents, num_blocks: video frames, latent frames and blocks to render.
        num_prefix_blocks: blocks of the shot before that are committed first.
        attended_blocks: the most history blocks that one block reads.
        bits_per_element: stored by ``codec`` for one element of K or V, scales and all.
        block_bytes: payloads of one block, all layers and heads, as ``codec`` keeps it.
        history_bytes: payloads of the whole shot, blocks committed anew and kept in several forms included: what a host
            or disk tier keeps.
        dense_history_bytes: the same K and V in bfloat16.
        arena_bytes: device arena: attended blocks and the one being committed, or the film's device budget.
        scratch_bytes: dense K and V of one layer's chunk of history.
        weights_bytes: the transformer's.
        summary_bytes: what retrieval remembers of every block.
        basis_bytes: the model's table of its heads, where a codec needs it.
        vae_bytes: the VAE's weights and its decoder's state; 0 where the model's folder is not here.
        partials_bytes: results of parts of the keys that FlashAttention-3 keeps meanwhile, where FP8 attention uses it.
        activation_bytes: what else a pass computed in between in the benchmark, by tokens and width; 0 without one.
        host_bytes: the host tier, or the text encoder while prompts are encoded before, whichever is larger.
        disk_bytes: history and latents; videos come on top.
        lacking_bytes: what the film's disk budget lacks for a history that stays there whole; a render stops when it is
            full. 0: nothing, or blocks that are not needed are deleted.
        seconds: to render it on one device; None without a benchmark.
        after: the shot that it starts from.
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
    summary_bytes: int
    basis_bytes: int
    vae_bytes: int
    partials_bytes: int
    activation_bytes: int
    host_bytes: int
    disk_bytes: int
    lacking_bytes: int
    seconds: float | None
    after: str | None

    @property
    def device_bytes(self) -> int:
        """Device memory as far as it is known before rendering."""
        named = self.arena_bytes + self.scratch_bytes + self.weights_bytes + self.summary_bytes
        named += self.basis_bytes
        return named + self.vae_bytes + self.partials_bytes + self.activation_bytes


def plan_shot(
    shot: ShotConfig, dtype_name: str = "bfloat16", calibrations: Sequence[Calibration] | None = None
) -> ShotPlan:
    """Add up what a shot takes.

    Args:
        shot: resolved.
        dtype_name: of weights and scratch: "bfloat16" (a GPU) or "float32" (a CPU).
        calibrations: of the hardware that is to render it.

    Raises:
        CapacityError: the device budget does not hold a block, or the disk's not what retrieval must keep.
    """
    import torch

    from longtake.engine.basis import basis_bytes
    from longtake.engine.retrieval import summary_bytes
    from longtake.engine.shotcache import shot_forms, wants_basis

    dtype: torch.dtype = getattr(torch, dtype_name)
    geometry, timeline = shot.model.transformer, Timeline(shot, shot.after_blocks)
    calibration = choose(calibrations, shot.cache.codec, shot.attention) if calibrations else None
    decoder_weights, vae_bytes = _vae(shot.model.path / "vae", *shot.latent_shape[-2:], dtype)
    codec, retrieve = shot_forms(shot)[0].codec, shot.history.policy is HistoryPolicy.RETRIEVE
    dense_block = 2 * 2 * shot.tokens_per_block * geometry.dim * geometry.num_layers
    scratch_bytes, partials_bytes = _attention(shot, codec, dtype, timeline.max_own_blocks * shot.tokens_per_block)
    activations = calibration.activation_bytes * shot.tokens_per_block * geometry.dim if calibration else 0
    history = _history(shot, timeline)
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
        block_bytes=history.block_bytes,
        history_bytes=history.all_bytes,
        dense_history_bytes=timeline.num_entries * dense_block,
        arena_bytes=history.arena_bytes,
        scratch_bytes=scratch_bytes,
        weights_bytes=_weights_bytes(geometry, shot.model.weights.precision, dtype),
        summary_bytes=summary_bytes(timeline.num_entries, geometry.num_heads, geometry.head_dim) if retrieve else 0,
        basis_bytes=basis_bytes(geometry) if wants_basis(shot) else 0,
        vae_bytes=vae_bytes,
        partials_bytes=partials_bytes,
        activation_bytes=round(activations),
        host_bytes=max(history.host_bytes, _files_bytes(shot.model.path / "text_encoder")),
        lacking_bytes=history.all_bytes - history.disk_bytes if shot.cache.keep is Keep.ALL else 0,
        disk_bytes=history.disk_bytes + shot.num_blocks * math.prod(shot.latent_shape) * _LATENT_BYTES,
        seconds=shot_seconds(shot, calibration, decoder_weights) if calibration else None,
        after=shot.after,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _History:
    """Bytes of a shot's payloads: of a block, of all, and in each tier."""

    block_bytes: int
    all_bytes: int
    arena_bytes: int
    host_bytes: int
    disk_bytes: int


def _history(shot: ShotConfig, timeline: Timeline) -> _History:
    from longtake.engine.shotcache import cache_budgets, check_room, kv_shape

    budgets = cache_budgets(shot, timeline)
    shapes = [kv_shape(shot, form=form) for form in range(len(budgets))]
    if shot.history.policy is HistoryPolicy.RETRIEVE:
        check_room(shot, timeline, shapes[0], budgets[0], disk=True)
    all_bytes = sum(len(timeline.kept(form)) * shape.block_bytes for form, shape in enumerate(shapes))
    tiers = list(zip(budgets, shapes, strict=True))
    return _History(
        block_bytes=shapes[0].block_bytes,
        all_bytes=all_bytes,
        arena_bytes=sum(budget.num_frames(shape) * shape.block_bytes for budget, shape in tiers),
        host_bytes=sum(budget.num_host_frames(shape, disk=True) * shape.block_bytes for budget, shape in tiers),
        disk_bytes=all_bytes if shot.cache.disk_bytes is None else min(all_bytes, shot.cache.disk_bytes),
    )


def _attention(shot: ShotConfig, codec: Codec, dtype: torch.dtype, own_tokens: int) -> tuple[int, int]:
    """(bytes of the scratch, bytes of FlashAttention-3's partial results) for blocks of so many tokens at once."""
    import torch

    from longtake.engine.rollout import scratch_tokens
    from longtake.kernels.attention_path import make_path
    from longtake.kernels.flash3 import partial_bytes

    geometry, scratch = shot.model.transformer, scratch_tokens(shot, shot.after_blocks, dtype)
    path = make_path(shot.attention, codec, geometry.num_heads, scratch, dtype, torch.device("meta"))
    if shot.attention != "fp8" or dtype != torch.bfloat16:
        return path.num_bytes, 0
    return path.num_bytes, partial_bytes(geometry.num_heads, own_tokens, geometry.head_dim, scratch)


@cache
def _weights_bytes(model: ModelConfig, precision: Precision, dtype: torch.dtype) -> int:
    import torch

    from longtake.engine.fp8_linear import quantise_linears
    from longtake.engine.model import CausalWan

    with torch.device("meta"):
        transformer = CausalWan(model).cast(dtype)
        if precision is Precision.FP8:
            quantise_linears(transformer)
    return sum(p.numel() * p.element_size() for p in transformer.parameters())


@cache
def _vae(folder: Path, height: int, width: int, dtype: torch.dtype) -> tuple[int | None, int]:
    """(weights of the VAE's decoder, bytes of the VAE and its decoder's state); (None, 0) if it is not here."""
    import torch
    from diffusers import AutoencoderKLWan

    from longtake.engine.vae import decoder_state_bytes

    if not (folder / "config.json").is_file():
        return None, 0
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder, local_files_only=True))
    weights = sum(p.numel() for p in vae.parameters()) * dtype.itemsize
    state = decoder_state_bytes(vae, height, width) * dtype.itemsize // torch.float32.itemsize
    return sum(p.numel() for p in vae.decoder.parameters()), weights + state


def _files_bytes(folder: Path) -> int:
    """Bytes of the weights in a folder; 0 if it is not here."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def plan_film(
    configs: Mapping[str, ShotConfig],
    dtype_name: str = "bfloat16",
    calibrations: Sequence[Calibration] | None = None,
) -> list[ShotPlan]:
    """Plans of all shots, in the order of rendering."""
    return [plan_shot(config, dtype_name, calibrations) for config in configs.values()]


def seconds_on(plans: Sequence[ShotPlan], num_gangs: int) -> float | None:
    """Seconds until a film is rendered by so many gangs of one device; None without a benchmark."""
    shots = [(plan.name, plan.after, plan.seconds) for plan in plans if plan.seconds is not None]
    return film_seconds(shots, num_gangs) if len(shots) == len(plans) else None


def to_json(plans: list[ShotPlan], num_gangs: int = 1) -> dict[str, Any]:
    """Plans as JSON-able data, with the film's totals: one shot is on a device at a time, histories add up."""
    return {
        "num_devices": num_gangs,
        "seconds": seconds_on(plans, num_gangs),
        "host_bytes": max(plan.host_bytes for plan in plans) * num_gangs,
        "disk_bytes": sum(plan.disk_bytes for plan in plans),
        "shots": [dataclasses.asdict(plan) | {"device_bytes": plan.device_bytes} for plan in plans],
        "num_frames": sum(plan.num_frames for plan in plans),
        "num_blocks": sum(plan.num_blocks for plan in plans),
        "device_bytes": max(plan.device_bytes for plan in plans),
        "history_bytes": sum(plan.history_bytes for plan in plans),
    }
