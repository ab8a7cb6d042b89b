"""What a block attends of the history and at which positions: plans, without tensors.

Positions are latent-frame indices. Keys are stored before RoPE, so a plan may place a block anywhere::

    window, sink 1, recent 3, relative positions, block 9 of 3 frames:

    blocks   0        6        7        8        9 (own)
    starts   0        3        6        9        12
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from longtake.engine.config import HistoryConfig, HistoryPolicy, Positions
from longtake.kernels.rotary import THETA
from longtake.offload.pages import page


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which history blocks one block attends, in order, and the position of each block's first latent frame.

    ``own_blocks`` consecutive blocks are computed together, the first at ``start``. ``forms`` says in which form each
    history block is read; empty: all in the first.
    """

    block: int
    start: float
    blocks: tuple[int, ...]
    starts: tuple[float, ...]
    own_blocks: int = 1
    forms: tuple[int, ...] = ()

    @property
    def pages(self) -> tuple[int, ...]:
        """What the cache is asked for: the blocks, each in its form."""
        if not self.forms:
            return self.blocks
        return tuple(page(form, block) for form, block in zip(self.forms, self.blocks, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What one block may bring back.

    Args:
        time: the block's number in time.
        first: of the scene: nothing before it is compared.
        times: that may be chosen, consecutive.
        entries: of the cache, the newest of each block from ``first`` to ``time - 1``.
    """

    time: int
    first: int
    times: range
    entries: Sequence[int]


def attended(config: HistoryConfig, block: int) -> tuple[int, ...]:
    """History blocks that ``block`` attends whatever it shows, ascending."""
    if config.policy is HistoryPolicy.FULL:
        return tuple(range(block))
    sinks = range(min(config.sink_blocks, block))
    recent = range(max(len(sinks), block - config.recent_blocks), block)
    return (*sinks, *recent)


def retrievable(config: HistoryConfig, block: int, first: int = 0) -> range:
    """History blocks of which ``block`` may bring some back; none is before ``first``."""
    if config.policy is not HistoryPolicy.RETRIEVE:
        return range(0)
    first = max(first, config.sink_blocks)
    return range(first, max(first, block - config.recent_blocks))


def place(
    config: HistoryConfig,
    time: int,
    times: Sequence[int],
    block_frames: int,
    *,
    own_blocks: int = 1,
    cut: int | None = None,
) -> tuple[float, tuple[float, ...]]:
    """Positions of a block and of what it attends.

    Only differences of positions matter to attention. A jitter is a pure function of reader and read.

    Args:
        config: the policy.
        time: the block's number in time.
        times: those of the blocks that it attends, ascending.
        block_frames: latent frames of a block.
        own_blocks: how many consecutive blocks are computed together from ``time`` on.
        cut: number of the first block of the scene; None: there was no cut. Attended blocks before it are kept apart:
            the scene stands at the end of the trained range as long as there is room between.

    Returns:
        Position of the block's first latent frame, and of each attended block's.
    """
    num, last = len(times), config.trained_frames - own_blocks * block_frames
    closed_up = [index * block_frames for index in range(num)]
    distances = [(time - other) * block_frames for other in times]
    before = sum(other < cut for other in times) if cut is not None else 0
    if config.positions is Positions.ABSOLUTE:
        jump = config.trained_frames if before else 0
        start = time * block_frames + jump
        starts = [start - distance - (jump if index < before else 0) for index, distance in enumerate(distances)]
    elif before:
        start = max(last, num * block_frames)
        starts = [at if i < before else start - (num - i) * block_frames for i, at in enumerate(closed_up)]
    elif config.positions is Positions.SINK:
        start = time * block_frames
        starts = [start - (num - index) * block_frames for index in range(num)]
    elif config.positions is Positions.BOUNDED:
        start = max(min(time * block_frames, last), num * block_frames)
        starts = [max(at, start - distance) for at, distance in zip(closed_up, distances, strict=True)]
    else:
        start, starts = num * block_frames, closed_up
    if config.jitter:
        return start, tuple(at + config.jitter * _jitter(time, other) for at, other in zip(starts, times, strict=True))
    return start, tuple(starts)


def head_thetas(config: HistoryConfig, heads: range) -> tuple[float, ...]:
    """The base of RoPE's speeds in time: one for all heads, or, with ``head_jitter``, theta (1 + head_jitter e) for
    each, e in [-1, 1) (multi-head RoPE jitter, arXiv 2601.16914: heads that turn at other speeds do not come round to
    the sinks at once).

    Args:
        config: the policy.
        heads: numbers of the model's heads that are attended here: the same ones turn alike on any number of ranks.
    """
    if not config.head_jitter:
        return (THETA,)
    return tuple(THETA * (1 + config.head_jitter * _draw(f"longtake head jitter v1|{head}")) for head in heads)


def _jitter(time: int, other: int) -> float:
    """A number in [-1, 1) that is the same wherever the same two blocks meet."""
    return _draw(f"longtake jitter v1|{time}|{other}")


def _draw(name: str) -> float:
    """A number in [-1, 1), evenly spread over names."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**63 - 1.0


def max_attended(config: HistoryConfig, num_blocks: int) -> int:
    """The most history blocks that any block of a shot attends at once."""
    last = num_blocks - 1
    return len(attended(config, last)) + min(config.retrieved_blocks, len(retrievable(config, last)))
