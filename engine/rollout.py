"""The rollout: plan, denoise, commit, block after block, over an encoded history.

A block's K/V exist dense for one layer at a time, inside the commit pass; the history is only ever read from payloads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.engine import history
from longtake.engine.attention import HistoryAttention
from longtake.engine.config import ShotConfig
from longtake.engine.model import CausalWan, TextContext
from longtake.engine.noise import block_noise
from longtake.engine.sampler import denoise, shifted_sigmas
from longtake.engine.timing import NO_TIMER, StageTimer
from longtake.kernels.attention_path import make_path
from longtake.kernels.codec import BlockGeometry, Codec, make_codec
from longtake.offload.cache import CacheBudget, KVCache
from longtake.offload.run import RunDirectory
from longtake.offload.shape import ModelKVShape

# Dense keys and values of one layer's chunk of history; more history than this is attended in several chunks.
SCRATCH_BYTES = 256 << 20
_PLANS_AHEAD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """Clean latents that a shot starts from, committed as history before its first block.

    Args:
        latents: float32 [C, F, Y, X] blocks, oldest first, on any device; none for a shot that starts from nothing.
    """

    latents: tuple[Tensor, ...] = ()


class Rollout:
    """One shot on one device: model, cache, and the block that comes next.

    History blocks are numbered from 0 with the prefix first, so block ``n`` of the shot is history block
    ``len(prefix) + n``. Not thread-safe; all work is issued on the current stream and nothing waits for the device.

    Args:
        shot: what to render.
        model: with its weights.
        contexts: cross-attention keys and values, one a beat.
        cache: holds the committed history; blocks already in it are not computed again.
        prefix: what the shot starts from.
        timer: for benchmarks.
    """

    def __init__(
        self,
        shot: ShotConfig,
        model: CausalWan,
        contexts: Sequence[TextContext],
        cache: KVCache,
        prefix: Prefix = Prefix(),
        timer: StageTimer = NO_TIMER,
    ) -> None:
        weight = model.proj_out.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.shot, self.model, self.contexts, self.cache, self.prefix = shot, model, contexts, cache, prefix
        self._timer = timer
        self._sigmas = shifted_sigmas(shot.sampler)
        self.codec = shot_codec(shot)
        self.path = make_path(
            shot.attention,
            self.codec,
            model.config.num_heads,
            scratch_tokens(shot, len(prefix.latents), self.dtype),
            self.dtype,
            self.device,
        )

    @property
    def next_block(self) -> int:
        """The shot's next block; negative while the prefix is being committed."""
        return self.cache.num_committed - len(self.prefix.latents)

    @property
    def total_blocks(self) -> int:
        """History blocks of the whole rollout, prefix included."""
        return len(self.prefix.latents) + self.shot.num_blocks

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Render and commit the next block (or commit the next one of the prefix).

        Returns:
            Its clean latents, float32 [C, F, Y, X] on the device.
        """
        index, block = self.cache.num_committed, self.next_block
        plan = history.plan(self.shot.history, index, self.shot.model.block_frames)
        context = self.contexts[self.shot.beat_of_block(max(block, 0))]
        with self.cache.prepare(plan.blocks) as reading:
            self.cache.schedule(self._coming(index + 1))
            attention = HistoryAttention(
                plan,
                reading,
                self.codec,
                self.shot.grid,
                self.shot.model.block_frames,
                self.path,
                self.device,
                self._timer,
            )

            def predict_flow(noisy: Tensor, sigma: float) -> Tensor:
                return self._run(noisy, 1000.0 * sigma, context, attention)

            if block < 0:
                clean = self.prefix.latents[index].to(self.device, torch.float32)
            else:
                clean = denoise(predict_flow, lambda step: self._noise(block, step), self._sigmas)
            commit = self.cache.begin_commit(index)
            try:
                self._run(clean, self.shot.sampler.context_timestep, context, attention.committing(commit))
            except BaseException:
                commit.abort()
                raise
            commit.complete()
        self.cache.retain(history.needed_later(self.shot.history, index + 1, self.total_blocks))
        return clean

    def memory(self) -> dict[str, int]:
        """Bytes by name: weights, scratch, text context and the cache's own."""
        contexts = (tensor for context in self.contexts for pair in context for tensor in pair)
        return {
            "weights": sum(p.numel() * p.element_size() for p in self.model.parameters()),
            "scratch": self.path.num_bytes,
            "text_context": sum(t.numel() * t.element_size() for t in contexts),
            **self.cache.memory(),
        }

    def _coming(self, index: int) -> list[tuple[int, ...]]:
        """What the next blocks will read, so that copies run ahead of them."""
        coming = range(index, min(index + _PLANS_AHEAD, self.total_blocks))
        return [history.attended(self.shot.history, block) for block in coming]

    def _noise(self, block: int, step: int) -> Tensor:
        noise = block_noise(self.shot.seed, self.shot.name, block, step, self.shot.latent_shape)
        if self.device.type == "cuda":
            return noise.pin_memory().to(self.device, non_blocking=True)
        return noise

    def _run(self, latents: Tensor, timestep: float, context: TextContext, attention: HistoryAttention) -> Tensor:
        frames = latents.shape[1] // self.model.config.patch_size[0]
        timesteps_BF = torch.full((1, frames), timestep, dtype=torch.float32, device=self.device)
        flow: Tensor = self.model(latents[None].to(self.dtype), timesteps_BF, context, attention)
        return flow[0]


def shot_codec(shot: ShotConfig) -> Codec:
    """The codec of a shot's history.

    Raises:
        ConfigError: there is no such codec.
    """
    head_dim = shot.model.transformer.head_dim
    return make_codec(shot.cache.codec, BlockGeometry(num_tokens=shot.tokens_per_block, head_dim=head_dim))


def kv_shape(shot: ShotConfig) -> ModelKVShape:
    """What is kept of each block of a shot."""
    model = shot.model.transformer
    return ModelKVShape(num_layers=model.num_layers, num_heads=model.num_heads, codec=shot_codec(shot))


def open_cache(shot: ShotConfig, device: torch.device, num_prefix: int = 0, run: RunDirectory | None = None) -> KVCache:
    """A cache that fits a shot.

    Args:
        shot: with its budgets.
        device: of the rollout.
        num_prefix: blocks that the shot starts from.
        run: the disk tier; None: the history lives and dies with the process.

    Raises:
        CapacityError: a budget is too small for the history that the shot attends.
    """
    total = num_prefix + shot.num_blocks
    budget = CacheBudget(
        device_bytes=shot.cache.device_bytes,
        num_blocks=history.max_attended(shot.history, total),
        host_bytes=shot.cache.host_bytes,
        disk_bytes=shot.cache.disk_bytes,
        total_blocks=total,
    )
    return KVCache(shape=kv_shape(shot), device=device, budget=budget, run=run)


def scratch_tokens(shot: ShotConfig, num_prefix: int, dtype: torch.dtype) -> int:
    """Rows of the scratch: whole blocks, at least one of history and the own one, at most ``SCRATCH_BYTES``."""
    row_bytes = 2 * shot.model.transformer.dim * dtype.itemsize
    wanted = history.max_attended(shot.history, num_prefix + shot.num_blocks) + 1
    fitting = SCRATCH_BYTES // (row_bytes * shot.tokens_per_block)
    return max(2, min(wanted, fitting)) * shot.tokens_per_block
