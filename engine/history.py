"""What a block attends of the history and at which positions: plans, without tensors.

Positions are latent-frame indices. Keys are stored before RoPE, so a plan may place a block anywhere::

    window, sink 1, recent 3, relative positions, block 9 of 3 frames:

    blocks   0        6        7        8        9 (own)
    starts   0        3        6        9        12
"""

from __future__ import annotations

from dataclasses import dataclass

from longtake.engine.config import HistoryConfig, HistoryPolicy, Positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which history blocks one block attends, in order, and the position of each block's first latent frame."""

    block: int
    start: int
    blocks: tuple[int, ...]
    starts: tuple[int, ...]


def attended(config: HistoryConfig, block: int) -> tuple[int, ...]:
    """History blocks that ``block`` attends, ascending."""
    if config.policy is HistoryPolicy.FULL:
        return tuple(range(block))
    sinks = range(min(config.sink_blocks, block))
    recent = range(max(len(sinks), block - config.recent_blocks), block)
    return (*sinks, *recent)


def plan(config: HistoryConfig, block: int, block_frames: int) -> Plan:
    """Plan one block.

    Args:
        config: the policy.
        block: index of the block to be rendered, from 0.
        block_frames: latent frames of a block.

    Returns:
        Its plan; history in ascending order, own block last.
    """
    blocks = attended(config, block)
    if config.positions is Positions.ABSOLUTE:
        return Plan(
            block=block, start=block * block_frames, blocks=blocks, starts=tuple(b * block_frames for b in blocks)
        )
    return Plan(
        block=block,
        start=len(blocks) * block_frames,
        blocks=blocks,
        starts=tuple(index * block_frames for index in range(len(blocks))),
    )


def needed_later(config: HistoryConfig, block: int, num_blocks: int) -> tuple[int, ...]:
    """History blocks that ``block`` or any later one of the shot may read; all others can leave fast memory.

    Args:
        config: the policy.
        block: the next block to be rendered.
        num_blocks: blocks of the shot.
    """
    if block >= num_blocks:
        return ()
    return attended(config, block)


def max_attended(config: HistoryConfig, num_blocks: int) -> int:
    """The most history blocks that any block of a shot attends at once."""
    return max((len(attended(config, block)) for block in (num_blocks - 1,)), default=0)
