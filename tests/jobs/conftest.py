from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longtake.engine.config import HistoryConfig, HistoryPolicy, ModelConfig, ModelSpec, SamplerConfig


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    """A model with mini's geometry, without weights."""
    return ModelSpec(
        path=tmp_path / "mini",
        name="mini",
        transformer=ModelConfig(num_heads=4, head_dim=64, num_layers=8, ffn_dim=1024, text_dim=256),
        sampler=SamplerConfig(timesteps=(1000, 750, 500, 250), shift=3.0),
        block_frames=3,
        fps=16,
        height=96,
        width=160,
        text_len=64,
        history=HistoryConfig(policy=HistoryPolicy.WINDOW, sink_blocks=1, recent_blocks=6),
    )


@pytest.fixture
def model_folder(tmp_path: Path, spec: ModelSpec) -> Path:
    """The same model as a folder in the hub's layout, as far as it is read before the weights."""
    folder = tmp_path / "models" / "tiny"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(spec.transformer.to_hub()))
    settings = {
        "name": "tiny",
        "timesteps": [1000, 750, 500, 250],
        "shift": 3.0,
        "block_frames": 3,
        "fps": 16,
        "height": 96,
        "width": 160,
        "text_len": 64,
        "history": {"policy": "window", "sink_blocks": 1, "recent_blocks": 6, "positions": "relative"},
    }
    (folder / "longtake.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder with random weights, as small as the classes allow: 32x48 pixels, blocks of 2 latents."""
    import torch
    from diffusers import AutoencoderKLWan
    from safetensors.torch import save_file
    from transformers import UMT5Config, UMT5EncoderModel

    from longtake.engine.model import CausalWan

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    geometry = ModelConfig(num_heads=2, head_dim=24, num_layers=2, ffn_dim=64, text_dim=32, freq_dim=32)
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(geometry.to_hub()))
    weights = {name: tensor.contiguous() for name, tensor in CausalWan(geometry).state_dict().items()}
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    vae: Any = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    vae.save_pretrained(folder / "vae")
    text = UMT5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
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
        "block_frames": 2,
        "fps": 8,
        "height": 32,
        "width": 48,
        "text_len": 64,
        "history": {"policy": "window", "sink_blocks": 1, "recent_blocks": 2},
    }
    (folder / "longtake.json").write_text(json.dumps(settings))
    return folder
