"""The published models that longtake knows by name: what they are, how they run, where their files are.

Settings are read from the projects' public configurations and model cards, no checkpoint was opened; ``unverified``
lists what rests on less than that. docs/models.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from longtake.engine.config import (
    WAN_1_3B,
    WAN_5B,
    WAN_14B,
    HistoryConfig,
    HistoryPolicy,
    Loop,
    ModelConfig,
    ModelSpec,
    Positions,
    SamplerConfig,
    Switch,
    WeightsConfig,
    WriteBack,
)

TEXT_LEN = 512  # of umT5-xxl's embeddings, in the whole family
_BASE_1_3B = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
_BASE_14B = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
_BASE_5B = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFiles:
    """Files of one repository of the hub.

    Args:
        repo: owner/name.
        patterns: which files; with ``*``.
        into: folder of the model that they go to; None: where they are in the repository.
        revision: branch or commit.
    """

    repo: str
    patterns: tuple[str, ...]
    into: str | None = None
    revision: str = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One model by name.

    Args:
        summary: one line.
        transformer: geometry.
        sampler: steps, shift, loop and write-back.
        history: window, sink and positions.
        block_frames: latent frames of a block.
        fps, height, width: of its video.
        switch: what a prompt switch does.
        files: what to fetch; the transformer's own go to transformer/.
        weights: which of them hold the transformer.
        licence: as the model card says; None: not known.
        spatial_stride: pixels a latent row; 16 for the VAE with 48 channels.
        few_step: trained to run causally in these steps; False: a base model, which a film needs another for.
        unverified: what could not be read from the projects' own pages.
    """

    summary: str
    transformer: ModelConfig
    sampler: SamplerConfig
    history: HistoryConfig
    block_frames: int = 3
    fps: int = 16
    height: int = 480
    width: int = 832
    switch: Switch = Switch.KEEP
    files: tuple[HubFiles, ...]
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    licence: str | None = None
    spatial_stride: int = 8
    few_step: bool = True
    unverified: tuple[str, ...] = ()


def _shared(repo: str) -> HubFiles:
    """The parts that a fine-tuned transformer shares with its base."""
    return HubFiles(repo=repo, patterns=("model_index.json", "vae/*", "text_encoder/*", "tokenizer/*", "scheduler/*"))


def _whole(repo: str) -> HubFiles:
    return HubFiles(
        repo=repo,
        patterns=("model_index.json", "transformer/*", "vae/*", "text_encoder/*", "tokenizer/*", "scheduler/*"),
    )


def _weights(repo: str, *names: str) -> HubFiles:
    return HubFiles(repo=repo, patterns=names, into="transformer")


_WINDOW_21 = HistoryConfig(sink_blocks=0, recent_blocks=6)
_FOUR_STEPS = SamplerConfig(timesteps=(1000, 750, 500, 250), shift=5.0)
_WHOLE_CLIP = HistoryConfig(policy=HistoryPolicy.FULL, positions=Positions.ABSOLUTE)

PRESETS: dict[str, Preset] = {
    "self-forcing": Preset(
        summary="Self-Forcing: 4 steps, blocks of 3, window of 21 latent frames",
        transformer=WAN_1_3B,
        sampler=_FOUR_STEPS,
        history=_WINDOW_21,
        files=(_shared(_BASE_1_3B), _weights("gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt")),
        weights=WeightsConfig(files=("self_forcing_dmd.pt",), key="generator_ema"),
        licence="cc-by-nc-sa-4.0",
    ),
    "causvid": Preset(
        summary="CausVid: 4 steps with shift 8, blocks of 3",
        transformer=WAN_1_3B,
        sampler=SamplerConfig(timesteps=(1000, 750, 500, 250), shift=8.0),
        history=_WINDOW_21,
        files=(_shared(_BASE_1_3B), _weights("tianweiy/CausVid", "autoregressive_checkpoint_warp_4step_cfg2/model.pt")),
        weights=WeightsConfig(files=("model.pt",), key="generator"),
        licence="cc-by-nc-4.0",
        unverified=("that this checkpoint runs with steps 1000, 750, 500, 250 before the shift",),
    ),
    "causal-forcing": Preset(
        summary="Causal Forcing, chunk-wise: 4 steps, blocks of 3",
        transformer=WAN_1_3B,
        sampler=_FOUR_STEPS,
        history=_WINDOW_21,
        files=(_shared(_BASE_1_3B), _weights("zhuhz22/Causal-Forcing", "chunkwise/causal_forcing.pt")),
        weights=WeightsConfig(files=("causal_forcing.pt",), key="generator"),
        licence="apache-2.0",
        unverified=("steps and shift (those of Self-Forcing)",),
    ),
    "causal-forcing-framewise": Preset(
        summary="Causal Forcing, frame-wise: 4 steps, blocks of 1; a picture is its first block",
        transformer=WAN_1_3B,
        sampler=_FOUR_STEPS,
        history=HistoryConfig(sink_blocks=0, recent_blocks=20),
        block_frames=1,
        files=(_shared(_BASE_1_3B), _weights("zhuhz22/Causal-Forcing", "framewise/causal_forcing.pt")),
        weights=WeightsConfig(files=("causal_forcing.pt",), key="generator_ema"),
        licence="apache-2.0",
        unverified=("steps and shift (those of Self-Forcing)", "whether the first block has steps of its own"),
    ),
    "longlive": Preset(
        summary="LongLive 1.0: base and LoRA, window of 12 latent frames with a sink of 3, recache at a new prompt",
        transformer=WAN_1_3B,
        sampler=_FOUR_STEPS,
        history=HistoryConfig(sink_blocks=1, recent_blocks=2),
        switch=Switch.RECACHE,
        files=(
            _shared(_BASE_1_3B),
            _weights("Efficient-Large-Model/LongLive-1.3B", "models/longlive_base.pt", "models/lora.pt"),
        ),
        weights=WeightsConfig(
            files=("longlive_base.pt",), key="generator", lora="lora.pt", lora_key="generator_lora", lora_alpha=256
        ),
        licence="cc-by-nc-sa-4.0",
        unverified=("the licence", "the key of longlive_base.pt"),
    ),
    "infinity-rope": Preset(
        summary="Infinity-RoPE: Self-Forcing's weights, positions from 0 at every block, flush at a new prompt",
        transformer=WAN_1_3B,
        sampler=_FOUR_STEPS,
        history=HistoryConfig(sink_blocks=1, recent_blocks=1),
        switch=Switch.FLUSH,
        files=(_shared(_BASE_1_3B), _weights("gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt")),
        weights=WeightsConfig(files=("self_forcing_dmd.pt",), key="generator_ema"),
        licence="cc-by-nc-sa-4.0",
        unverified=("its window of 6 and sink of 1 latent frames, here 9 and 3 as whole blocks are kept",),
    ),
    "rolling-forcing": Preset(
        summary="Rolling Forcing: a window of 5 blocks, each a step cleaner than the next; one pass a block",
        transformer=WAN_1_3B,
        sampler=SamplerConfig(timesteps=(1000, 800, 600, 400, 200), shift=5.0, loop=Loop.ROLLING),
        history=HistoryConfig(sink_blocks=1, recent_blocks=5, positions=Positions.SINK),
        files=(_shared(_BASE_1_3B), _weights("TencentARC/RollingForcing", "checkpoints/rolling_forcing_dmd.pt")),
        weights=WeightsConfig(files=("rolling_forcing_dmd.pt",), key="generator_ema"),
        unverified=("the licence", "how many recent blocks are seen beside the window (here 21 latent frames in all)"),
    ),
    "krea-14b": Preset(
        summary="Krea realtime 14B: 4 steps, history rebuilt from the last 3 clean latents before each block",
        transformer=WAN_14B,
        sampler=SamplerConfig(timesteps=(1000, 750, 500, 250), shift=5.0, write_back=WriteBack.REBUILD),
        history=HistoryConfig(sink_blocks=0, recent_blocks=1),
        files=(_shared(_BASE_1_3B), _weights("krea/krea-realtime-video", "krea-realtime-video-14b.safetensors")),
        weights=WeightsConfig(files=("krea-realtime-video-14b.safetensors",)),
        licence="apache-2.0",
        unverified=("the licence", "it encodes the first context frame anew from pixels, which is not done here"),
    ),
    "wan2.1-1.3b": Preset(
        summary="Wan2.1 T2V 1.3B, the base: not causal, not distilled; parts of it are shared by the models above",
        transformer=WAN_1_3B,
        sampler=SamplerConfig(timesteps=tuple(1000 * (50 - i) / 50 for i in range(50)), shift=3.0),
        history=_WHOLE_CLIP,
        block_frames=21,
        files=(_whole(_BASE_1_3B),),
        licence="apache-2.0",
        few_step=False,
    ),
    "wan2.1-14b": Preset(
        summary="Wan2.1 T2V 14B, the base: not causal, not distilled",
        transformer=WAN_14B,
        sampler=SamplerConfig(timesteps=tuple(1000 * (50 - i) / 50 for i in range(50)), shift=5.0),
        history=_WHOLE_CLIP,
        block_frames=21,
        files=(_whole(_BASE_14B),),
        licence="apache-2.0",
        few_step=False,
    ),
    "longlive-2": Preset(
        summary="LongLive 2.0 on Wan2.2-TI2V-5B: 48 latent channels, blocks of 8, window of 32 with a sink of 8",
        transformer=WAN_5B,
        sampler=_FOUR_STEPS,
        history=HistoryConfig(sink_blocks=1, recent_blocks=2, trained_frames=32),
        block_frames=8,
        fps=24,
        height=704,
        width=1280,
        switch=Switch.RECACHE,
        files=(_shared(_BASE_5B), _weights("Efficient-Large-Model/LongLive-2.0-5B", "model_bf16.pt")),
        weights=WeightsConfig(files=("model_bf16.pt",)),
        spatial_stride=16,
        unverified=("the licence", "steps and shift", "the keys of model_bf16.pt", "what a prompt switch does"),
    ),
}


def preset_spec(name: str, path: Path) -> ModelSpec:
    """What a rollout must know of a preset's model, whose weights are in a folder or are made up."""
    preset = PRESETS[name]
    return ModelSpec(
        path=path,
        name=name,
        transformer=preset.transformer,
        sampler=preset.sampler,
        block_frames=preset.block_frames,
        fps=preset.fps,
        height=preset.height,
        width=preset.width,
        text_len=TEXT_LEN,
        history=preset.history,
        spatial_stride=preset.spatial_stride,
        weights=preset.weights,
        switch=preset.switch,
    )
