"""In which form a block of the history is read, by age and number alone: decided before a shot starts, no tensors.

A form is a codec, and how many neighbouring tokens are merged. Each block is encoded in all the forms that a later
reader reads of it, in its commit pass, and never again::

    codec = "rtn4", tiers = { 2 = "bf16" }
    block          5     6     7     8     9     10    11
    reader 11      rtn4  rtn4  rtn4  rtn4  bf16  bf16           bf16 from 11 - 2 on
    reader 12      rtn4  rtn4  rtn4  rtn4  rtn4  bf16  bf16
    and refresh = 4
    reader 11      rtn4  rtn4  rtn4  bf16  bf16  bf16           bf16 from 8 on, 11 - 2 rounded down ...
    reader 12      rtn4  rtn4  rtn4  bf16  bf16  bf16  bf16     ... until reader 14, which has bf16 from 12 on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from longtake.engine.config import CacheConfig, HistoryConfig, HistoryPolicy
from longtake.kernels.errors import ConfigError

Numbers: TypeAlias = NDArray[np.int64]
LEFT_OUT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class FormSpec:
    """A codec's name, and rows and columns of tokens that are merged; (1, 1) for none."""

    codec: str
    window: tuple[int, int] = (1, 1)

    @property
    def merged(self) -> bool:
        """Whether a token stands for several."""
        return self.window != (1, 1)


class FormPolicy:
    """What the settings say of each block and reader, both by number in time.

    Args:
        history, cache: of the shot.

    Raises:
        ConfigError: settings that make no sense.
    """

    def __init__(self, history: HistoryConfig, cache: CacheConfig) -> None:
        _check(history, cache)
        self._cache, self._prune = cache, history.prune
        self._sinks = 0 if history.policy is HistoryPolicy.FULL else history.sink_blocks
        specs = [FormSpec(codec=cache.codec)]
        young = [] if cache.first is None else [cache.first]
        young += [tier.codec for tier in cache.tiers]
        young += [] if cache.important is None else [cache.important]
        specs += [FormSpec(codec=codec) for codec in young]
        if self._prune is not None and self._prune.merge not in (None, (1, 1)):
            assert self._prune.merge is not None
            specs.append(FormSpec(codec=cache.codec, window=self._prune.merge))
        self.specs = tuple(dict.fromkeys(specs))
        self._number = {spec: number for number, spec in enumerate(self.specs)}

    @property
    def plain(self) -> bool:
        """Whether every block is read, and in the first form."""
        return len(self.specs) == 1 and self._prune is None

    def forms(self, reader: int, blocks: Sequence[int]) -> Numbers:
        """Numbers of the forms that a reader reads some blocks in; LEFT_OUT for those that it leaves out."""
        cache, prune = self._cache, self._prune
        block = np.asarray(blocks, dtype=np.int64)
        found = np.zeros(len(block), dtype=np.int64)
        for tier in reversed(cache.tiers):
            found[block >= (reader - tier.age) // cache.refresh * cache.refresh] = self._of(tier.codec)
        if prune is not None:
            old = (reader - block > prune.recent_blocks) & (block >= self._sinks)
            place = rank(block)
            if cache.important is not None:
                found[old & (place < prune.important)] = self._of(cache.important)
            spec = None if prune.merge is None else FormSpec(codec=cache.codec, window=prune.merge)
            pruned = old & (place >= prune.important + (1.0 - prune.important) * prune.keep)
            found[pruned] = LEFT_OUT if spec is None else self._number[spec]
        if cache.first is not None:
            found[block < cache.first_blocks] = self._of(cache.first)
        return found

    def _of(self, codec: str) -> int:
        return self._number[FormSpec(codec=codec)]


def rank(block: Numbers) -> NDArray[np.float64]:
    """A place in [0, 1) for each block, evenly spread however many blocks in a row there are (golden ratio, Weyl).

    The block's importance, 0 the most: the first block has 0. A rule without tensors, so that what is dropped is known
    before a shot starts and never comes back.
    """
    return (block.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.float64) / 2.0**64


def _check(history: HistoryConfig, cache: CacheConfig) -> None:
    ages = [tier.age for tier in cache.tiers]
    if ages != sorted(set(ages)) or any(age < 0 for age in ages) or (ages[:1] == [0] and cache.refresh == 1):
        raise ConfigError(f"tiers = {ages}: ages are whole numbers from 1 on (from 0 with refresh), each once")
    if cache.refresh < 1 or (cache.refresh > 1 and not cache.tiers):
        raise ConfigError("refresh keeps young blocks in their tier: it needs tiers, and a number from 1 on")
    if cache.first_blocks < 1:
        raise ConfigError("first_blocks counts blocks from 1 on")
    prune = history.prune
    if cache.important is not None and prune is None:
        raise ConfigError("important is the codec of blocks that pruning calls so: it needs prune in the history")
    if prune is not None:
        if not 0 <= prune.important <= 1 or not 0 <= prune.keep <= 1:
            raise ConfigError("prune: important and keep are shares from 0 to 1")
        if prune.recent_blocks < 1:
            raise ConfigError("prune: recent_blocks counts blocks from 1 on")
