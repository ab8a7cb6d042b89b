"""What a rollout is told: model geometry, sampler, history, cache, shot. Frozen data; nothing here touches a tensor."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longtake.kernels.errors import ConfigError
from longtake.offload.chunkfiles import DiskIO


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Geometry of the transformer: the part of transformer/config.json that the causal model uses."""

    num_heads: int
    head_dim: int
    num_layers: int
    ffn_dim: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    @property
    def dim(self) -> int:
        """Model width."""
        return self.num_heads * self.head_dim

    @classmethod
    def from_hub(cls, config: dict[str, Any], where: str) -> ModelConfig:
        """Read diffusers' transformer/config.json.

        Raises:
            ConfigError: it names a feature that the causal model does not have.
        """
        if config.get("added_kv_proj_dim") is not None or config.get("image_dim") is not None:
            raise ConfigError(
                f"{where}: image cross-attention (added_kv_proj_dim, image_dim) is not supported; "
                "use a text-to-video model"
            )
        if config.get("qk_norm") != "rms_norm_across_heads" or not config.get("cross_attn_norm", True):
            raise ConfigError(
                f"{where}: expected qk_norm 'rms_norm_across_heads' and cross_attn_norm true, as all Wan models have"
            )
        return cls(
            num_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            num_layers=config["num_layers"],
            ffn_dim=config["ffn_dim"],
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels") or config["in_channels"],
            text_dim=config["text_dim"],
            freq_dim=config["freq_dim"],
            patch_size=tuple(config["patch_size"]),
            eps=config.get("eps", 1e-6),
        )

    def to_hub(self) -> dict[str, Any]:
        """The same as diffusers' transformer/config.json."""
        return {
            "_class_name": "WanTransformer3DModel",
            "num_attention_heads": self.num_heads,
            "attention_head_dim": self.head_dim,
            "num_layers": self.num_layers,
            "ffn_dim": self.ffn_dim,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "text_dim": self.text_dim,
            "freq_dim": self.freq_dim,
            "patch_size": list(self.patch_size),
            "eps": self.eps,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
            "added_kv_proj_dim": None,
            "image_dim": None,
        }


WAN_1_3B = ModelConfig(num_heads=12, head_dim=128, num_layers=30, ffn_dim=8960)
WAN_5B = ModelConfig(num_heads=24, head_dim=128, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48)
WAN_14B = ModelConfig(num_heads=40, head_dim=128, num_layers=40, ffn_dim=13824)


class Loop(enum.StrEnum):
    """BLOCKS: one block after the other, all its steps. ROLLING: a window of as many blocks as there are steps, each
    one step cleaner than the next; every pass takes all of them one step on and finishes the first."""

    BLOCKS = "blocks"
    ROLLING = "rolling"


class WriteBack(enum.StrEnum):
    """How a block's keys and values come to be kept.

    CLEAN: by a pass over the clean block that sees the history the block saw. REBUILD: before each block the history is
    computed anew from the last clean latents, which see nothing but each other.
    """

    CLEAN = "clean"
    REBUILD = "rebuild"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerConfig:
    """Denoising steps of a block, as timesteps in (0, 1000] before the shift, and the level of the commit pass.

    ``first_timesteps`` are those of a shot's first block where they differ.
    """

    timesteps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    context_timestep: float = 0.0
    first_timesteps: tuple[float, ...] | None = None
    loop: Loop = Loop.BLOCKS
    write_back: WriteBack = WriteBack.CLEAN


class HistoryPolicy(enum.StrEnum):
    """What a block attends of the history."""

    FULL = "full"
    WINDOW = "window"
    RETRIEVE = "retrieve"


class Positions(enum.StrEnum):
    """Where the blocks that are read stand in time.

    ABSOLUTE: at their latent frames of the shot. RELATIVE: closed up from 0, so that positions never leave the
    trained range. SINK: recent blocks at their latent frames of the shot, older ones right before them. BOUNDED: at
    their true distance where that lies in the trained range, older ones closed up at its far end.
    """

    ABSOLUTE = "absolute"
    RELATIVE = "relative"
    SINK = "sink"
    BOUNDED = "bounded"


class Switch(enum.StrEnum):
    """What becomes of the history when the prompt changes.

    KEEP: nothing. RECACHE: the recent blocks are committed anew under the new prompt (LongLive). FLUSH: only the sinks
    and the last block are attended from here on (Infinity-RoPE). CUT: only the sinks are, and the new scene stands at
    the end of the trained range, away from them.
    """

    KEEP = "keep"
    RECACHE = "recache"
    FLUSH = "flush"
    CUT = "cut"


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneConfig:
    """Which older blocks are not attended as they are (after FlowCache's shares).

    A block is old when more than ``recent_blocks`` lie between it and its reader. Of the old ones ``important`` (a
    share), and of the rest ``keep`` (a share), stay whole; sinks always do. The others are left out, or, with ``merge``
    (rows, columns), read as mean tokens of so many.
    """

    recent_blocks: int
    important: float = 0.1
    keep: float = 0.3
    merge: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryConfig:
    """History policy; ``sink_blocks`` and ``recent_blocks`` count what a window keeps besides the block itself,
    ``retrieved_blocks`` what is brought back from between them.

    ``trained_frames`` is the range of positions that the model was trained on, ``jitter`` the most latent frames by
    which a history block's position is moved, differently for every reader, ``head_jitter`` the part of RoPE's base by
    which that of each head is moved at most.
    """

    policy: HistoryPolicy = HistoryPolicy.WINDOW
    sink_blocks: int = 1
    recent_blocks: int = 6
    retrieved_blocks: int = 0
    positions: Positions = Positions.RELATIVE
    trained_frames: int = 21
    jitter: float = 0.0
    head_jitter: float = 0.0
    prune: PruneConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig:
    """Blocks at most ``age`` blocks before their reader are read as ``codec`` keeps them."""

    age: int
    codec: str


class Keep(enum.StrEnum):
    """What of the history stays on the disk. ALL: every block. NEEDED: those that a block to come may read."""

    ALL = "all"
    NEEDED = "needed"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Codecs of the history, budgets in bytes (``None``: as much as the plan needs), and how the disk is used.

    Of these, only the codecs, and which blocks have which, decide what a shot looks like.

    Args:
        codec: of every block, for every reader that nothing below says otherwise of.
        tiers: codecs of young blocks, youngest first.
        refresh: a block changes its tier only when the reader's number is a multiple of this.
        first: codec of the shot's first ``first_blocks`` blocks, at any age.
        important: codec of the blocks that pruning calls important, at any age.
        device_bytes, host_bytes, disk_bytes: budgets.
        keep: what stays on the disk.
        disk_io: how payloads reach it.
    """

    codec: str = "bf16"
    tiers: tuple[TierConfig, ...] = ()
    refresh: int = 1
    first: str | None = None
    first_blocks: int = 1
    important: str | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    disk_bytes: int | None = None
    keep: Keep = Keep.ALL
    disk_io: DiskIO = DiskIO.AUTO


class Precision(enum.StrEnum):
    """MODEL: bfloat16 on a GPU, float32 on a CPU. FP8: e4m3 with a scale a row, rounded when they are loaded."""

    MODEL = "model"
    FP8 = "fp8"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """Which files of transformer/ hold the weights; the defaults are a diffusers folder's.

    Args:
        files: names or patterns in transformer/.
        key: entry of a .pt file that holds the tensors; None: found out.
        lora: a .pt or safetensors file with a PEFT LoRA to be merged.
        lora_key: as ``key``, of that file.
        lora_alpha: PEFT's; a LoRA of rank r is scaled by lora_alpha / r. None: by 1.
        precision: of the blocks' matrices.
    """

    files: tuple[str, ...] = ("*.safetensors",)
    key: str | None = None
    lora: str | None = None
    lora_key: str | None = None
    lora_alpha: float | None = None
    precision: Precision = Precision.MODEL


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model folder and its settings: longtake.json, read once. ``switch`` is what a beat does unless it says."""

    path: Path
    name: str
    transformer: ModelConfig
    sampler: SamplerConfig
    block_frames: int
    fps: int
    height: int
    width: int
    text_len: int
    history: HistoryConfig
    spatial_stride: int = 8
    temporal_stride: int = 4
    weights: WeightsConfig = WeightsConfig()
    switch: Switch = Switch.KEEP


@dataclass(frozen=True, slots=True, kw_only=True)
class BeatConfig:
    """The prompt from a moment of the shot on; over ``transition_s`` its embedding is blended in."""

    at_s: float
    prompt: str
    switch: Switch = Switch.KEEP
    transition_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaConfig:
    """A picture or a clip that a shot starts from or follows; what counts is its content."""

    path: Path
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryTable:
    """Which table of its heads a model has: what the file holds, and the rates of the layers.

    Args:
        hash: of the file's content.
        quarters: of a bit an element, by layer, for each of `pc2`, `pc3` and `pc4`.
    """

    hash: str
    quarters: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShotConfig:
    """Everything that decides what one shot looks like, resolved: no defaults left to fill in.

    ``attention`` is how history is attended: dense (the model's dtype) or fp8.
    ``beats[0].at_s`` is 0. ``after`` names the shot whose last ``after_blocks`` blocks start this one; if that is 0,
    its last frame is this one's first. ``clip`` is a video whose last blocks, as many, do so instead. ``image`` is the
    first frame. ``guide`` is a video that every block starts from, noised to ``strength``. ``history_basis``:
    the model's table, where a codec needs it.
    """

    name: str
    model: ModelSpec
    num_frames: int
    fps: int
    height: int
    width: int
    seed: int
    beats: tuple[BeatConfig, ...]
    sampler: SamplerConfig
    history: HistoryConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    attention: str = "dense"
    video_codec: str = "h264"
    after: str | None = None
    after_blocks: int = 0
    clip: MediaConfig | None = None
    image: MediaConfig | None = None
    guide: MediaConfig | None = None
    strength: float = 1.0
    history_basis: HistoryTable | None = None

    @property
    def continues(self) -> bool:
        """Whether latents come before the shot's own."""
        return self.after_blocks > 0

    @property
    def begins_with_picture(self) -> bool:
        """Whether the first frame is given: a picture, or another shot's last frame."""
        return self.image is not None or (self.after is not None and self.after_blocks == 0)

    def frames_of_latents(self, num_latents: int) -> int:
        """Video frames that the first ``num_latents`` latent frames of the shot decode to."""
        first = 0 if self.continues else 1
        return max(0, first + (num_latents - first) * self.model.temporal_stride)

    @property
    def num_latents(self) -> int:
        """Latent frames that hold ``num_frames``: the first of a clip is one frame, each later ``temporal_stride``."""
        first = 0 if self.continues else 1
        return first + -(-(self.num_frames - first) // self.model.temporal_stride)

    @property
    def num_blocks(self) -> int:
        """Blocks to render; the last one's surplus frames are not written."""
        return -(-self.num_latents // self.model.block_frames)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, Y, X) of one block of latents."""
        stride = self.model.spatial_stride
        return (
            self.model.transformer.in_channels,
            self.model.block_frames,
            self.height // stride,
            self.width // stride,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns of one latent frame."""
        _, patch_y, patch_x = self.model.transformer.patch_size
        _, _, latent_y, latent_x = self.latent_shape
        return latent_y // patch_y, latent_x // patch_x

    @property
    def tokens_per_block(self) -> int:
        """Tokens of one block: latent frames x rows x columns."""
        rows, columns = self.grid
        return self.model.block_frames // self.model.transformer.patch_size[0] * rows * columns

    def beat_of_block(self, block: int) -> int:
        """Index of the beat that a block is rendered under: the last one that began before the block's middle."""
        model = self.model
        middle = self.frames_of_latents(block * model.block_frames) + model.block_frames * model.temporal_stride / 2
        started = [index for index, beat in enumerate(self.beats) if beat.at_s * self.fps < middle]
        return started[-1]
