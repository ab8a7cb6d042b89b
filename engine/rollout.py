"""The rollout: plan, denoise, commit, block after block, over an encoded history.

A block's K/V exist dense for one layer at a time, inside the commit pass; the history is only ever read from payloads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from longtake.engine.attention import HistoryAttention
from longtake.engine.basis import read_basis
from longtake.engine.config import Loop, Precision, ShotConfig
from longtake.engine.fp8_linear import is_fp8
from longtake.engine.graphs import CudaRecording, PassGraphs
from longtake.engine.history import Plan, head_thetas
from longtake.engine.model import CausalWan, TextContext
from longtake.engine.noise import block_noise
from longtake.engine.prompts import Prompts
from longtake.engine.retrieval import Retrieval
from longtake.engine.rolling import RollingWindow, WindowStore
from longtake.engine.sampler import denoise, shifted_sigmas
from longtake.engine.shotcache import open_cache as open_cache
from longtake.engine.shotcache import shot_forms, wants_basis
from longtake.engine.timeline import Entry, Kind, Timeline
from longtake.engine.timing import NO_TIMER, StageTimer
from longtake.kernels.attention_path import make_path
from longtake.kernels.errors import ConfigError, StorageError
from longtake.kernels.principal import HistoryBasis
from longtake.offload.cache import KVCache
from longtake.offload.forms import FormCache

# Dense keys and values of one layer's chunk of history; more history than this is attended in several chunks.
SCRATCH_BYTES = 256 << 20
_PLANS_AHEAD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """What a shot starts from.

    Args:
        latents: float32 [C, F, Y, X] blocks, oldest first, on any device, committed as history before the first block;
            none for a shot that starts from nothing.
        fixed: float32 [C, f, Y, X], the first latent frames of the shot's first block: a picture.
        guide: block of the shot -> float32 [C, F, Y, X] that its denoising starts from; None: from noise.
    """

    latents: tuple[Tensor, ...] = ()
    fixed: Tensor | None = None
    guide: Callable[[int], Tensor] | None = None


class Rollout:
    """One shot on one device: model, cache, and the block that comes next.

    Blocks are numbered in time from 0 with the prefix first, so block ``n`` of the shot is block ``len(prefix) + n``;
    which of the cache's entries hold which block, the timeline knows. Not thread-safe; all work is issued on the
    current stream and nothing waits for the device, but for the two moments in which passes are recorded.

    Args:
        shot: what to render.
        model: with its weights.
        contexts: cross-attention keys and values, one a beat, or prompts with transitions.
        cache: holds the committed history; blocks already in it are not computed again.
        prefix: what the shot starts from.
        timer: for benchmarks.
        stages: told of the time that a block prepares, is denoised and committed, for metrics.
        read_latents: block of the shot -> its clean latents as an earlier run left them; needed to go on behind a
            prompt that has history committed anew.
        windows: keeps a rolling window between blocks, so that a shot can go on.
        graphs: record passes that repeat as CUDA graphs, on a GPU.
        basis: of a model without a folder, for codecs that want one; None: the one in the model's folder.

    Attributes:
        rest: where passes may be recorded, told before those of each plan whether they will be; if so, it returns when
            no other thread uses the device. To be replaced where there are such threads beside the cache's.
    """

    def __init__(
        self,
        shot: ShotConfig,
        model: CausalWan,
        contexts: Sequence[TextContext] | Prompts,
        cache: KVCache | FormCache,
        prefix: Prefix = Prefix(),
        timer: StageTimer = NO_TIMER,
        *,
        read_latents: Callable[[int], Tensor] | None = None,
        windows: WindowStore | None = None,
        stages: StageTimer = NO_TIMER,
        graphs: bool = True,
        basis: HistoryBasis | None = None,
    ) -> None:
        weight = model.proj_out.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.shot, self.model, self.cache, self.prefix = shot, model, cache, prefix
        self.prompts = contexts if isinstance(contexts, Prompts) else Prompts(shot, contexts)
        self.timeline = Timeline(shot, len(prefix.latents))
        _check_start(shot, prefix, self.prompts)
        if is_fp8(model) != (shot.model.weights.precision is Precision.FP8):
            raise ConfigError(f"shot {shot.name!r}: its model was loaded with weights of another precision")
        self._timer, self._stages = timer, stages
        self.passes = PassGraphs(model, CudaRecording if graphs and self.device.type == "cuda" else None)
        self.rest: Callable[[bool], None] = lambda due: cache.flush() if due else None
        self._read_latents = read_latents
        self._recent: OrderedDict[int, Tensor] = OrderedDict()
        self._drawn: tuple[int, Tensor] | None = None  # a block, and its first noise
        self._fixed = None if prefix.fixed is None else prefix.fixed.to(self.device, torch.float32)
        if basis is None and wants_basis(shot):
            basis = read_basis(shot.model, model.heads, self.device, shot.history_basis)
        self._basis_bytes = 0 if basis is None else basis.num_bytes
        self.forms = shot_forms(shot, basis)
        self.codec = self.forms[0].codec
        self.path = make_path(
            shot.attention,
            self.codec,
            len(model.heads),
            scratch_tokens(shot, len(prefix.latents), self.dtype, len(model.heads)),
            self.dtype,
            self.device,
        )
        self._thetas = head_thetas(shot.history, model.heads)
        self._retrieval = Retrieval(shot, model, self.timeline, cache)
        self._rolling: RollingWindow | None = None
        if shot.sampler.loop is Loop.ROLLING:
            sigmas = shifted_sigmas(shot.sampler)
            self._rolling = RollingWindow(shot.num_blocks, sigmas, self._window_flow, self._noise, windows)

    @property
    def next_block(self) -> int:
        """The shot's next block; negative while the prefix is being committed."""
        if self.cache.num_committed == self.timeline.num_entries:
            return self.shot.num_blocks
        return self.timeline.entry(self.cache.num_committed).step

    @property
    def total_blocks(self) -> int:
        """Blocks of the whole rollout, prefix included."""
        return len(self.prefix.latents) + self.shot.num_blocks

    @property
    def retrieved(self) -> tuple[int, ...]:
        """What came back for the last block, as numbers in time: the prefix first."""
        return self._retrieval.last

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Render and commit the next block (or commit the next one of the prefix).

        Blocks that must be committed anew before it are: they belong to this step.

        Returns:
            Its clean latents, float32 [C, F, Y, X] on the device.
        """
        while (entry := self.timeline.entry(self.cache.num_committed)).kind is Kind.REPLAY:
            self._commit(entry, self._clean(entry.time))
        if entry.kind is Kind.PREFIX:
            clean = self._commit(entry, self._clean(entry.time))
        elif self._rolling is not None:
            clean = self._commit(entry, self._rolling.finish(entry.step))
        elif self._read_plan(entry) == self._write_plan(entry):
            clean = self._commit(entry, partial(self._denoise, entry))
        else:
            with self._reading(entry, self._read_plan(entry)) as attention:
                clean = self._denoise(entry, attention)
            self._commit(entry, clean)
        self._remember(entry.time, clean)
        if self._rolling is None and 0 <= (following := entry.step + 1) < self.shot.num_blocks:
            self._drawn = (following, self._noise(following, 0))  # while the device is at this block
        return clean

    def memory(self) -> dict[str, int]:
        """Bytes by name: weights, scratch, text context, latents that may be committed anew, recorded passes, what
        other ranks write into, the model's table of its heads, and the cache's own."""
        return {
            "weights": sum(p.numel() * p.element_size() for p in self.model.parameters()),
            "scratch": self.path.num_bytes,
            "text_context": self.prompts.num_bytes,
            "retrieval_summaries": self._retrieval.num_bytes,
            "recent_latents": sum(latents.nbytes for latents in self._recent.values()),
            "recorded_passes": self.passes.num_bytes,
            "exchange_buffers": self.model.exchange_bytes,
            "history_basis": self._basis_bytes,
            **self.cache.memory(),
        }

    def close(self) -> None:
        """Let recorded passes go; those of a gang must go before its process groups. The cache is the caller's."""
        self.passes.clear()

    def _read_plan(self, entry: Entry) -> Plan:
        return self.timeline.read_plan(entry, self._retrieval.chosen(entry))

    def _write_plan(self, entry: Entry) -> Plan:
        return self.timeline.write_plan(entry, self._retrieval.chosen(entry))

    @contextmanager
    def _reading(self, entry: Entry, plan: Plan) -> Iterator[HistoryAttention]:
        """Attention over a plan's history, as long as it is readable."""
        with self._stages("prepare"):
            prepared = self.cache.prepare(plan.pages)
        with prepared as reading:
            self.cache.schedule(self.timeline.coming(entry.index + 1, _PLANS_AHEAD, self._retrieval.expected))
            attention = HistoryAttention(
                plan,
                reading,
                self.forms,
                self.shot.model.block_frames,
                self.path,
                self.device,
                self._timer,
                self._thetas,
            )
            if self.passes.meant:
                self.rest(self.passes.due(entry.index, attention, self.prompts.context(entry.step)))
            yield attention

    def _commit(self, entry: Entry, clean: Tensor | Callable[[HistoryAttention], Tensor]) -> Tensor:
        """One clean pass whose keys and values are kept; ``clean`` may still be to be denoised under the same plan."""
        with self._reading(entry, self._write_plan(entry)) as attention:
            latents = clean if isinstance(clean, Tensor) else clean(attention)
            commit = self.cache.begin_commit(entry.index)
            try:
                context = self.prompts.context(entry.step)
                committing = attention.committing(commit, self._retrieval.keeper(commit))
                with self._stages("commit"):
                    self._run(entry, latents, self.shot.sampler.context_timestep, context, committing)
            except BaseException:
                commit.abort()
                raise
            commit.complete()
        self._retrieval.look_ahead(entry.index + 1)
        self.cache.retain(self.timeline.needed_later(entry.index + 1))
        return latents

    def _denoise(self, entry: Entry, attention: HistoryAttention) -> Tensor:
        block, sampler = entry.step, self.shot.sampler
        guide = None if self.prefix.guide is None else self.prefix.guide(block).to(self.device, torch.float32)
        fixed = self._fixed if block == 0 else None
        context = self.prompts.context(block)

        def predict_flow(noisy: Tensor, sigma: float) -> Tensor:
            num_fixed = 0 if fixed is None else fixed.shape[1]
            return self._run(entry, noisy, 1000.0 * sigma, context, attention, num_fixed)

        sigmas = shifted_sigmas(sampler, first=entry.time == 0, strength=1.0 if guide is None else self.shot.strength)
        with self._stages("denoise"):
            return denoise(predict_flow, partial(self._noise, block), sigmas, guide=guide, fixed=fixed)

    def _window_flow(self, first: int, noisy: Tensor, sigmas: tuple[float, ...]) -> Tensor:
        """The flow of several blocks at once, each at its own noise level, from ``first`` on."""
        entry = self.timeline.entry(self.timeline.index_of(first))
        frames = noisy.shape[1] // self.model.config.patch_size[0] // len(sigmas)
        timesteps = [1000.0 * sigma for sigma in sigmas for _ in range(frames)]
        plan = self.timeline.window_plan(entry, len(sigmas))
        with self._reading(entry, plan) as attention, self._stages("denoise"):
            return self._run(entry, noisy, timesteps, self.prompts.context(first), attention)

    def _clean(self, time: int) -> Tensor:
        """Clean latents of an earlier block."""
        block = time - len(self.prefix.latents)
        if block < 0:
            return self.prefix.latents[time].to(self.device, torch.float32)
        if time not in self._recent:
            if self._read_latents is None:
                raise StorageError("the latents of an earlier block are needed and were not kept", block=block)
            self._recent[time] = self._read_latents(block).to(self.device, torch.float32)
        return self._recent[time]

    def _remember(self, time: int, clean: Tensor) -> None:
        """Keep the latents that may be committed anew."""
        if not self.timeline.replays:
            return
        self._recent[time] = clean
        while len(self._recent) > self.shot.history.recent_blocks:
            self._recent.popitem(last=False)

    def _noise(self, block: int, step: int) -> Tensor:
        if step == 0 and self._drawn is not None and self._drawn[0] == block:
            return self._drawn[1]
        noise = block_noise(self.shot.seed, self.shot.name, block, step, self.shot.latent_shape)
        if self.device.type == "cuda":
            return noise.pin_memory().to(self.device, non_blocking=True)
        return noise

    def _run(
        self,
        entry: Entry,
        latents: Tensor,
        timestep: float | Sequence[float],
        context: TextContext,
        attention: HistoryAttention,
        num_fixed: int = 0,
    ) -> Tensor:
        """The flow of a block; one timestep, or one a frame; the first ``num_fixed`` frames are clean."""
        frames = latents.shape[1] // self.model.config.patch_size[0]
        if isinstance(timestep, float):
            timesteps_BF = torch.full((1, frames), timestep, dtype=torch.float32, device=self.device)
            timesteps_BF[:, :num_fixed] = 0.0
        else:
            timesteps_BF = torch.tensor([timestep], dtype=torch.float32, device=self.device)
        return self.passes.run(entry.index, latents[None].to(self.dtype), timesteps_BF, context, attention)[0]


def _check_start(shot: ShotConfig, prefix: Prefix, prompts: Prompts) -> None:
    """That what the shot asks for was given: a caller that does not know of it must not render without it."""
    given = {
        "image": not shot.begins_with_picture or prefix.fixed is not None,
        "video": shot.guide is None or prefix.guide is not None,
        "clip": shot.clip is None or len(prefix.latents) == shot.after_blocks,
        "transition": prompts.blends or not any(beat.transition_s for beat in shot.beats),
    }
    if missing := [name for name, there in given.items() if not there]:
        raise ConfigError(f"shot {shot.name!r}: {', '.join(missing)} cannot be rendered here")


def scratch_tokens(shot: ShotConfig, num_prefix: int, dtype: torch.dtype, num_heads: int | None = None) -> int:
    """Rows of the scratch: whole blocks, at least one of history and the own ones, at most ``SCRATCH_BYTES``.

    Args:
        num_heads: that are attended here; None: all of the model's.
    """
    model = shot.model.transformer
    row_bytes = 2 * (num_heads or model.num_heads) * model.head_dim * dtype.itemsize
    timeline = Timeline(shot, num_prefix)
    own = timeline.max_own_blocks
    wanted = timeline.max_attended + own
    fitting = SCRATCH_BYTES // (row_bytes * shot.tokens_per_block)
    return max(own + 1, min(wanted, fitting)) * shot.tokens_per_block
