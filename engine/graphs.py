"""Passes of the model as CUDA graphs: a steady rollout issues the same kernels block after block.

To issue one pass kernel by kernel takes the host about as long as a GPU needs to run it, and several times as long when
GPUs share it. Recorded once, a pass is issued in one call::

    block n        runs kernel by kernel         what it looks like is noted
    block n + 1    looks the same: recorded      once for the passes that denoise, once for the one that commits
    block n + 2    replayed

What differs between such passes is copied to where the recording reads it: latents, timesteps, RoPE's tables, slots of
the history's pages. A recorded commit encodes into pages of its own, which are copied to the block's. Source: CUDA C++
Programming Guide, "CUDA Graphs"; torch.cuda.CUDAGraph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longtake.engine.attention import HistoryAttention
from longtake.engine.model import CausalWan, TextContext

_log = logging.getLogger(__name__)


class Recording(Protocol):
    """Work that was recorded once."""

    @property
    def num_bytes(self) -> int:
        """Device memory that it keeps for its intermediate results, shared with those it was recorded beside."""

    def replay(self) -> Tensor:
        """Issue it again on the current stream; the result is overwritten by the next replay."""


_Key = tuple[Hashable, ...]
Recorder = Callable[[Callable[[], Tensor], Recording | None], Recording]
"""Records a function; its memory is shared with another recording that lives and never runs at the same time."""


class CudaRecording:
    """A CUDA graph. Made on a stream of its own, as urgent as the current one; nothing of it runs before the first
    replay.

    Args:
        run: what to record; it ran before, so that all is compiled and warm.
        beside: whose memory to share.

    Raises:
        RuntimeError: the device has no room for the intermediate results, or something in it cannot be recorded.
    """

    def __init__(self, run: Callable[[], Tensor], beside: Recording | None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        pool = beside._graph.pool() if isinstance(beside, CudaRecording) else None
        # other threads may use CUDA meanwhile, though the rollout lets them finish before
        stream = torch.cuda.Stream(priority=torch.cuda.current_stream().priority)
        recording = torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with _own_workspaces(), recording:
            self._out = run()

    @property
    def num_bytes(self) -> int:
        pool = tuple(self._graph.pool())
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == pool)

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._out


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """What is recorded takes cuBLAS's workspace from its own pool, where its replays find it as long as it lives.

    PyTorch keeps one a thread and stream: one that an earlier recording took would be in that one's pool, which may be
    gone, and this one's would be held, and counted, beside the pool that it is in. Source: PyTorch's CUDA graph trees.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    """One pass.

    Args:
        key: what other passes must have in common with it.
        context: that it reads; kept, for the key has its identity.
        latents_BCFYX, timesteps_BF: what it reads, to be filled.
        attention: likewise, and pages that a commit fills.
        num_layers: of the model.
        recording: of the pass.
    """

    key: _Key
    context: TextContext
    latents_BCFYX: Tensor
    timesteps_BF: Tensor
    attention: HistoryAttention
    num_layers: int
    recording: Recording

    def run(self, latents_BCFYX: Tensor, timesteps_BF: Tensor, attention: HistoryAttention) -> Tensor:
        self.latents_BCFYX.copy_(latents_BCFYX)
        self.timesteps_BF.copy_(timesteps_BF)
        self.attention.take_inputs(attention, self.num_layers)
        flow = self.recording.replay().clone()
        self.attention.give_pages(attention, self.num_layers)
        return flow


class PassGraphs:
    """Runs a model's passes, recorded where they repeat. Not thread-safe; all on the current stream.

    Args:
        model: of the rollout.
        recorder: None: everything runs kernel by kernel.
    """

    def __init__(self, model: CausalWan, recorder: Recorder | None) -> None:
        self._model, self._recorder = model, recorder
        self.meant = recorder is not None  # as on every rank of a gang, whatever becomes of a recording
        self._seen: dict[bool, tuple[_Key, int]] = {}
        self._recorded: dict[bool, _Recorded] = {}
        self.pool_bytes = 0  # of intermediate results: the allocator holds them and does not count them as in use
        self._page_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Device memory held: intermediate results, and pages that commits are encoded into."""
        return self.pool_bytes + self._page_bytes

    def run(
        self,
        block: int,
        latents_BCFYX: Tensor,
        timesteps_BF: Tensor,
        context: TextContext,
        attention: HistoryAttention,
    ) -> Tensor:
        """One pass; arguments but the first as CausalWan's.

        Args:
            block: whose pass it is: passes of one block are no reason to record.
        """
        shape = None if self._recorder is None else attention.shape
        if shape is not None:
            key = (shape, attention.kept_forms, latents_BCFYX.shape, timesteps_BF.shape, id(context))
            recorded = self._recorded.get(attention.commits)
            if (recorded is None or recorded.key != key) and self._repeats(attention.commits, key, block):
                recorded = self._record(key, latents_BCFYX, timesteps_BF, context, attention)
            if recorded is not None and recorded.key == key:
                return recorded.run(latents_BCFYX, timesteps_BF, attention)
        flow: Tensor = self._model(latents_BCFYX, timesteps_BF, context, attention)
        return flow

    def due(self, block: int, attention: HistoryAttention, context: TextContext) -> bool:
        """Whether a pass of this block will be recorded: an earlier block's looked the same, and was not."""
        if self._recorder is None or (shape := attention.shape) is None:
            return False
        alike = (shape, id(context))
        seen = [key for key, earlier in self._seen.values() if earlier != block and (key[0], key[-1]) == alike]
        return any(key not in (one.key for one in self._recorded.values()) for key in seen)

    def clear(self) -> None:
        """Let recordings go: those with collectives before their process groups."""
        self._seen.clear()
        self._recorded.clear()
        self.pool_bytes = self._page_bytes = 0

    def _repeats(self, commits: bool, key: _Key, block: int) -> bool:
        """Whether an earlier block had such a pass last; notes this one if not."""
        seen = self._seen.get(commits)
        if seen is None or seen[0] != key:
            self._seen[commits] = (key, block)
            return False
        return seen[1] != block

    def _record(
        self,
        key: _Key,
        latents_BCFYX: Tensor,
        timesteps_BF: Tensor,
        context: TextContext,
        attention: HistoryAttention,
    ) -> _Recorded | None:
        assert self._recorder is not None
        self._recorded.pop(attention.commits, None)
        beside = next((other.recording for other in self._recorded.values()), None)
        latents, timesteps = latents_BCFYX.clone(), timesteps_BF.clone()
        num_layers = self._model.config.num_layers
        fixed = attention.fixed(num_layers)
        try:
            recording = self._recorder(lambda: self._model(latents, timesteps, context, fixed), beside)
        except RuntimeError as error:  # no room for it, or a driver's refusal: a film must not end for that
            _log.warning("passes cannot be recorded as CUDA graphs and go on kernel by kernel: %s", error)
            self.clear()
            self._recorder = None
            return None
        recorded = _Recorded(
            key=key,
            context=context,
            latents_BCFYX=latents,
            timesteps_BF=timesteps,
            attention=fixed,
            num_layers=num_layers,
            recording=recording,
        )
        self._recorded[attention.commits] = recorded
        self.pool_bytes = recording.num_bytes
        self._page_bytes = sum(one.attention.page_bytes(num_layers) for one in self._recorded.values())
        return recorded
