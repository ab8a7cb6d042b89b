"""Random weights: in a model of any size, for benchmarks; in a folder as small as the classes allow, for tests too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from longtake.engine.config import ModelConfig
from longtake.engine.model import CausalWan
from longtake.engine.tensor_parallel import ShardedRMSNorm

Wan = TypeVar("Wan", bound=CausalWan)

TINY = ModelConfig(num_heads=2, head_dim=24, num_layers=2, ffn_dim=64, text_dim=32, freq_dim=32)


def randomise(model: Wan, device: torch.device, dtype: torch.dtype) -> Wan:
    """Give a model on the meta device random weights of about the trained ones' size, made on the device."""
    model.cast(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.RMSNorm | nn.LayerNorm | ShardedRMSNorm) and name == "weight":
                parameter.data.fill_(1.0)
            elif parameter.ndim == 1:
                parameter.data.zero_()
            else:
                parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)


def write_random_model(folder: Path, *, transformer: ModelConfig = TINY, block_frames: int = 2, fps: int = 8) -> Path:
    """Write a model that renders noise, 32x48 pixels, two steps a block, a window of a sink and two blocks.

    Args:
        folder: made; in the hub's layout.
        transformer: its geometry; any text_dim.
        block_frames: latent frames of a block.
        fps: of its videos.

    Returns:
        The folder.
    """
    torch.manual_seed(0)
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(transformer.to_hub()))
    weights = {name: tensor.contiguous() for name, tensor in CausalWan(transformer).state_dict().items()}
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    vae: Any = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    vae.save_pretrained(folder / "vae")
    text = UMT5Config(vocab_size=384, d_model=transformer.text_dim, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    UMT5EncoderModel(text).save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}'
    )
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    settings = {
        "name": "tiny",
        "timesteps": [1000, 500],
        "shift": 3.0,
        "block_frames": block_frames,
        "fps": fps,
        "height": 32,
        "width": 48,
        "text_len": 64,
        "history": {"policy": "window", "sink_blocks": 1, "recent_blocks": 2},
    }
    (folder / "longtake.json").write_text(json.dumps(settings))
    return folder
