from __future__ import annotations

import json
from pathlib import Path

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
