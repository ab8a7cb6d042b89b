"""The prompt of each block: one a beat, or two blended while one beat passes into the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longtake.engine.config import ShotConfig
from longtake.engine.model import CausalWan, TextContext


class Prompts:
    """Cross-attention contexts by block. Not thread-safe.

    Args:
        shot: its beats.
        contexts: one a beat.
        blend: (beat, weight) -> context of ``weight`` parts of that beat's embedding and the rest of the one before;
            None where no beat has a transition.
    """

    def __init__(
        self,
        shot: ShotConfig,
        contexts: Sequence[TextContext],
        blend: Callable[[int, float], TextContext] | None = None,
    ) -> None:
        self._shot, self.contexts, self._blend = shot, contexts, blend
        self._blended: tuple[tuple[int, float], TextContext] | None = None

    def context(self, block: int) -> TextContext:
        """The context of a block of the shot; of the first one for blocks of the prefix, which are negative."""
        beat, weight = blend_of_block(self._shot, max(block, 0))
        if weight == 1.0 or self._blend is None:
            return self.contexts[beat]
        if self._blended is None or self._blended[0] != (beat, weight):
            self._blended = ((beat, weight), self._blend(beat, weight))
        return self._blended[1]

    @property
    def blends(self) -> bool:
        """Whether prompts can pass into each other."""
        return self._blend is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of all contexts that are held."""
        held = [*self.contexts, *([self._blended[1]] if self._blended else [])]
        tensors = {id(tensor): tensor.nbytes for context in held for pair in context for tensor in pair}
        return sum(tensors.values())


def blend_of_block(shot: ShotConfig, block: int) -> tuple[int, float]:
    """(beat, how much of it): below 1 in the blocks that begin within its transition, rising evenly.

    With n blocks in the transition the k-th of them, from 1, has k / (n + 1).
    """
    beat = shot.beat_of_block(block)
    transition_s = shot.beats[beat].transition_s
    if beat == 0 or not transition_s:
        return beat, 1.0
    first = block
    while first > 0 and shot.beat_of_block(first - 1) == beat:
        first -= 1
    block_s = shot.model.block_frames * shot.model.temporal_stride / shot.fps
    num_blocks = round(transition_s / block_s)
    return beat, min(1.0, (block - first + 1) / (num_blocks + 1))


def make_prompts(shot: ShotConfig, model: CausalWan, embeds: Sequence[Tensor]) -> Prompts:
    """Contexts of a shot's beats.

    Args:
        shot: its beats.
        model: with its weights.
        embeds: text embeddings [K, E], one a beat, on any device.
    """
    device = model.proj_out.weight.device

    def context(embed_KE: Tensor) -> TextContext:
        with torch.inference_mode():
            return model.text_context(embed_KE[None].to(device))

    made: dict[str, TextContext] = {}
    for beat, embed in zip(shot.beats, embeds, strict=True):
        if beat.prompt not in made:
            made[beat.prompt] = context(embed)
    contexts = [made[beat.prompt] for beat in shot.beats]
    if not any(beat.transition_s for beat in shot.beats):
        return Prompts(shot, contexts)
    return Prompts(shot, contexts, lambda beat, weight: context(torch.lerp(embeds[beat - 1], embeds[beat], weight)))
