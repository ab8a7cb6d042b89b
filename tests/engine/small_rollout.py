"""A model and shots small enough to roll out in a test."""

from __future__ import annotations

from pathlib import Path

import torch

from longtake.engine.config import (
    BeatConfig,
    CacheConfig,
    HistoryConfig,
    ModelConfig,
    ModelSpec,
    SamplerConfig,
    ShotConfig,
)
from longtake.engine.model import CausalWan, TextContext

GEOMETRY = ModelConfig(num_heads=2, head_dim=32, num_layers=2, ffn_dim=96, text_dim=16, in_channels=4, out_channels=4)
ONE_BEAT = (BeatConfig(at_s=0, prompt="a"),)


def make_shot(
    history: HistoryConfig,
    codec: str,
    num_blocks: int,
    *,
    beats: tuple[BeatConfig, ...] = ONE_BEAT,
    size: tuple[int, int] = (48, 64),
    after_blocks: int = 0,
) -> ShotConfig:
    """A shot of blocks of two latent frames and two steps.

    Args:
        history, codec: what is attended, and how it is kept.
        num_blocks: of the shot.
        beats: its prompts.
        size: height and width in pixels.
        after_blocks: of another shot, from which it starts.
    """
    sampler = SamplerConfig(timesteps=(1000, 500))
    height, width = size
    spec = ModelSpec(
        path=Path("unused"),
        name="test",
        transformer=GEOMETRY,
        sampler=sampler,
        block_frames=2,
        fps=16,
        height=height,
        width=width,
        text_len=5,
        history=history,
    )
    return ShotConfig(
        name="shot",
        model=spec,
        num_frames=8 * num_blocks if after_blocks else 1 + 4 * (2 * num_blocks - 1),
        fps=16,
        height=height,
        width=width,
        seed=11,
        beats=beats,
        sampler=sampler,
        history=history,
        cache=CacheConfig(codec=codec),
        after="before" if after_blocks else None,
        after_blocks=after_blocks,
    )


def random_model(config: ModelConfig = GEOMETRY, device: str = "cpu") -> CausalWan:
    """Weights under which activations keep their size; in bfloat16 on a GPU."""
    torch.manual_seed(3)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = CausalWan(config).eval().requires_grad_(False).to(device, dtype)
    for parameter in model.parameters():
        parameter.normal_().mul_(0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model


def random_contexts(model: CausalWan, num_beats: int) -> list[TextContext]:
    """A prompt for each beat."""
    torch.manual_seed(4)
    device = model.proj_out.weight.device
    with torch.inference_mode():
        texts = [torch.randn(1, 5, model.config.text_dim).to(device) for _ in range(num_beats)]
        return [model.text_context(text) for text in texts]
